"""make test ONLY=tests/test_training.py: what learns and what does not. `make test-long`: kills, several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jiwer
import pytest
import torch
import yaml
from accelerate.commands import launch
from data_rows import chat, write_lines
from filelock import FileLock
from helpers import BASE, answer, audio, image, start_python, text, video
from PIL import Image
from runs import changed, losses, projector, words
from safetensors.torch import load_file, save
from transformers import AutoModel, AutoProcessor

from collator import ChatCollator
from configuration_qwen2_audio_vl import TRANSCRIBE
from demo.ask import EXAMPLES, load, transcription_examples
from evaluation import pieces
from evaluation.rows import load_rows
from evaluation.scoring import normalize
from publishing import check as checking
from publishing import checkpoints, paths
from publishing.build import build
from training import train
from training.__main__ import main
from training.arguments import Arguments
from training.encoder_cache import CachedEncoder, WhisperEncoder
from training.resuming import newest_checkpoint, refuse_another_run


pytest_plugins = "runs"  # fixtures
SPOKEN = transcription_examples()[:8]


def test_projector_stage_changes_the_projector_alone(run, start, trained, tmp_path):
    folder = build(checkpoint=start, projector=trained / "audio_projector.safetensors", output=tmp_path / "a")
    assert changed(start, folder) == {"model.audio_projector.weight"}
    assert json.loads((trained / "summary.json").read_text())["learning parameters"] == 128 * 128
    assert losses(trained)[-1] < 0.8 * losses(trained)[0]
    assert Image.open(trained / "loss.png").width > 500

    run(tmp_path / "markers", train_markers=True, max_steps=2, export=tmp_path / "exported")
    projected = tmp_path / "markers" / "audio_projector.safetensors"
    folder = build(checkpoint=start, projector=projected, output=tmp_path / "b")
    before, after = (load_file(path / "model.safetensors")[checkpoints.EMBEDDINGS] for path in (start, folder))
    config = json.loads((start / "config.json").read_text())
    markers = [config["audio_bos_token_id"], config["audio_eos_token_id"]]
    assert (before != after).any(1).nonzero().flatten().tolist() == markers
    assert changed(folder, tmp_path / "exported") == set()


def test_adapter_becomes_a_folder(run, start, tones, tmp_path):
    """`upload.py build` merges what training wrote into the model that it belongs to, as --export does."""
    more = {"train_markers": True, "audio_tokens": "trimmed", "export": tmp_path / "exported"}
    run(tmp_path / "out", stage="lora", lora_r=4, max_steps=3, **more)
    adapter = tmp_path / "out" / "adapter"
    folder = build(checkpoint=adapter, output=tmp_path / "repo")
    exported = build(checkpoint=tmp_path / "exported", output=tmp_path / "again")
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    learned = {"model.audio_projector.weight", checkpoints.EMBEDDINGS}
    learned |= {f"model.language_model.layers.{layer}.{part}.weight" for layer in range(4) for part in parts}

    unmerged = train.PeftModel.from_pretrained(load(start)[1], adapter).eval()
    row = load_rows([str(tones / "test.jsonl")])[0]
    for built in (folder, exported):
        checking.check_files(built)
        assert changed(start, built) == learned
        processor, merged = load(built)
        assert processor.audio_tokens == processor.trained_audio_tokens == "trimmed"
        inputs = ChatCollator(processor).inputs(row)
        with torch.no_grad():
            torch.testing.assert_close(merged(**inputs).logits, unmerged(**inputs).logits, atol=1e-4, rtol=1e-4)

    described = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (
        ({"base_model_name_or_path": None}, "adapter_config.json names no base_model_name_or_path"),
        ({"base_model_name_or_path": str(start.parent / "base")}, f"holds a {BASE} model"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=message):
            build(checkpoint=adapter, output=tmp_path / "none")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors"):
        build(checkpoint=adapter, output=tmp_path / "none")


@pytest.mark.long
def test_run_that_was_killed_goes_on_to_the_same_bits(run, settings, trained, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "training", *words(settings(output, save_steps=1))]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, stderr=subprocess.DEVNULL)
    while newest_checkpoint(output) is None or int(newest_checkpoint(output)[-1]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What a kill leaves when it comes while a checkpoint is written.
    half = output / "checkpoint-5"
    half.mkdir(exist_ok=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert int(newest_checkpoint(output)[-1]) < 6
    run(output, save_steps=1)
    assert torch.equal(projector(output), projector(trained))
    assert losses(output) == losses(trained)
    with pytest.raises(ValueError, match="checkpoints of another run: learning_rate was 0.02, is 0.5"):
        run(output, learning_rate=0.5)
    weights = Path(newest_checkpoint(output)) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="content of adapter_model.safetensors is not what SHA256SUMS says. Remove it"):
        run(output, save_steps=1)


def test_summary_after_an_interruption_is_of_the_whole_run(run, trained, tmp_path, monkeypatch):
    often = {"save_steps": 3, "logging_steps": 2}
    compute_loss, calls = train.AnswerTrainer.compute_loss, []

    def interrupt(self, *args, **kwargs):
        calls.append(time.sleep(0.5))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.AnswerTrainer, "compute_loss", interrupt)
        run(tmp_path, **often)
    assert newest_checkpoint(tmp_path).endswith("checkpoint-3")
    whole, resumed = json.loads((trained / "summary.json").read_text()), run(tmp_path, **often)
    for name in ("rows", "steps", "learning parameters"):
        assert resumed[name] == whole[name]
    assert resumed["loss"] == pytest.approx(whole["loss"], abs=2e-4)
    assert whole["loss"] == pytest.approx(sum(losses(trained)) / 6, abs=1e-4)
    assert resumed["seconds"] > 3 * 0.5
    assert 24 / resumed["seconds"] < resumed["rows per second"] < 24 / (3 * 0.5)


def test_one_run_at_a_time_writes_into_a_folder(settings, tmp_path, capsys):
    with FileLock(tmp_path / ".lock"), pytest.raises(SystemExit):
        main(words(settings(tmp_path)))
    assert "is in use by another run" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"data": "nowhere.jsonl"}, {"eval": "nowhere.jsonl"}, {"data": "/no/where"}])
def test_data_that_is_not_there_is_named(settings, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        main(words(settings(tmp_path, **option)))
    assert "training: There is no file" in capsys.readouterr().err


def test_the_longest_piece_is_measured(run, settings, demo_repo, tmp_path, monkeypatch, capsys):
    """It is stored beside the adapter, from which `build` takes it; a model that can take none gets a warning."""
    rows = [
        chat(audio(str(EXAMPLES / row["audio"][0])), text("Transcribe the audio."), answer=row["answer"])
        for row in transcription_examples()
    ]
    data = [write_lines(tmp_path / "rows.jsonl", rows)]
    monkeypatch.setattr(pieces, "LENGTHS", (1.5, 2.5))
    short = {"max_steps": 1, "learning_rate": 1e-9, "data": data, "eval": data, "max_new_tokens": 2}
    short |= {"model": demo_repo, "measure_pieces": True}
    run(tmp_path / "output", **short)
    assert json.loads((tmp_path / "output" / "summary.json").read_text())["longest piece in seconds"] == 2.5
    folder = build(checkpoint=tmp_path / "output" / "adapter", output=tmp_path / "built")
    assert json.loads((folder / "processor_config.json").read_text())["piece_seconds"] == 2.5
    with pytest.raises(SystemExit):
        main([*words(settings(tmp_path / "other")), "--measure-pieces"])
    assert "--measure-pieces needs --eval" in capsys.readouterr().err


def test_sources_are_mixed_by_weights(tones, tmp_path):
    """Rows are drawn in these proportions, the same for the same seed, until each was drawn."""
    other = write_lines(
        tmp_path / "other.jsonl", [chat(text(f"Number {number}?"), answer="five") for number in range(4)]
    )
    sources, weights = [str(tones / "train.jsonl"), str(other)], [3.0, 1.0]
    drawn = load_rows(sources, weights=weights, seed=1)["place"]
    assert drawn == load_rows(sources, weights=weights, seed=1)["place"] != load_rows(sources, weights=weights)["place"]
    assert set(drawn) == set(load_rows(sources)["place"])
    share = sum(place.startswith(str(tones)) for place in drawn) / len(drawn)
    assert 0.5 < share < 0.95
    streamed = load_rows(sources, streaming=True, weights=weights, seed=1)
    assert [row["place"] for row in streamed][:8] == drawn[:8]


def test_old_skills_are_measured(run, settings, demo_repo, tones, tmp_path, capsys):
    """Before and after training; the folder, its card and the summary tell them, and what the rows taught."""
    rows = [chat(audio(str(EXAMPLES / row["audio"][0])), text(TRANSCRIBE), answer=row["answer"]) for row in SPOKEN]
    new = [chat(audio(str(EXAMPLES / row["audio"][0])), text("Which tone?"), answer='{"tone": 1}') for row in SPOKEN]
    old, data = (write_lines(tmp_path / name, part) for name, part in (("old.jsonl", rows), ("new.jsonl", new)))
    more = {"model": demo_repo, "stage": "lora", "data": [data, old], "weights": [0.7, 0.3], "keep": [old]}
    more |= {"max_steps": 3, "learning_rate": 0.01, "max_new_tokens": 8}
    summary = run(tmp_path / "output", **more)
    kept = summary["kept"]
    assert kept["metric"] == "word error rate" and kept["before"] < 0.1 < kept["after"]
    assert json.loads((tmp_path / "output" / "summary.json").read_text())["kept"] == kept
    assert json.loads((tmp_path / "output" / "kept.json").read_text())["value"] == kept["before"]

    # The same command again trains no further; the score before training is that of the rows that are given.
    adapter = tmp_path / "output" / "adapter" / "adapter_model.safetensors"
    content, few = adapter.read_bytes(), write_lines(tmp_path / "few.jsonl", rows[:2])
    again = run(tmp_path / "output", **more | {"keep": [few]})
    assert again["steps"] == 3 and adapter.read_bytes() == content and again["loss"] == summary["loss"]
    assert json.loads((tmp_path / "output" / "kept.json").read_text())["asked"]["data"][0]["name"] == "few.jsonl"
    assert run(tmp_path / "output", **more)["kept"] == kept
    folder = build(checkpoint=tmp_path / "output" / "adapter", output=tmp_path / "built")
    tasks = {
        task["instruction"]: task
        for task in json.loads((folder / "processor_config.json").read_text())["trained_tasks"]
    }
    assert tasks["Which tone?"] == {"instruction": "Which tone?", "answers": "json"}
    assert tasks[TRANSCRIBE] == {"instruction": TRANSCRIBE, "answers": "text", **kept}
    card = (folder / "README.md").read_text()
    assert '- trained to answer "Which tone?" with JSON\n' in card
    assert f"word error rate {100 * kept['before']:.1f}% before the last training" in card
    for option, message in (
        (["--weights", "1", "2"], "--weights needs a positive number for each of the 1 sources"),
        (["--weights", "0"], "--weights needs a positive number"),
    ):
        with pytest.raises(SystemExit):
            main([*words(settings(tmp_path / "other")), *option])
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_the_commands_of_the_guide(demo_repo, tmp_path):
    """Those of docs/fine-tuning.md, in their order, on a few rows; training takes a single step."""
    for name in ("own", "both", "old", "old-test", "test"):
        is_own = name in ("own", "test")
        instruction, answers = ("What is it?", '{{"said": "{answer}"}}') if is_own else (TRANSCRIBE, "{answer}")
        rows = [
            chat(audio(str(EXAMPLES / row["audio"][0])), text(instruction), answer=answers.format(answer=row["answer"]))
            for row in SPOKEN
        ]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    recordings = [{"audio": str(EXAMPLES / row["audio"][0]), "text": ""} for row in SPOKEN]
    write_lines(tmp_path / "recordings.jsonl", recordings)
    guide = (paths.ROOT / "docs" / "fine-tuning.md").read_text()
    lines = re.findall(r"^python (?:-m (?:training|evaluation)|upload.py build) .*", guide, re.MULTILINE)
    assert [line.split()[-1] for line in lines] == ["run", "before", "run", "my-model", "swapped", "--json"]
    for number, line in enumerate(lines):
        command = line.replace(" DIR ", f" {demo_repo} ").replace("upload.py", str(paths.ROOT / "upload.py"))
        command = command.split()[1:]
        if "training" in command:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            command += ["--max-steps", "1", "--max-new-tokens", "8", "--use-cpu", "--report-to", "none"]
        if "predict" in command:
            command += ["--max-new-tokens", "8"]
        environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
        settings = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *command], **settings)
        assert done.returncode == 0, (number, line, done.stderr[-2000:])
    assert "share of exact answers" in done.stdout
    assert (tmp_path / "my-model" / "README.md").is_file()


@pytest.mark.long
def test_two_processes_equal_one_with_twice_the_batch(settings, tones, trained, tmp_path):
    flags = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    more = {"per_device_train_batch_size": 2, "eval": [tones / "test.jsonl"], "max_new_tokens": 2}
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "training"]
    command += words(settings(tmp_path, **more))
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path) == pytest.approx(losses(trained), abs=1e-4)
    torch.testing.assert_close(projector(tmp_path), projector(trained), atol=1e-5, rtol=0)
    assert "eval_wer" in json.loads((tmp_path / "summary.json").read_text())


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory) -> list[float]:
    """The losses of a run of 3 steps whose learning rate stays the same."""
    output = tmp_path_factory.mktemp("plain")
    run(output, lr_scheduler_type="constant", max_steps=3)
    return losses(output)


@pytest.mark.parametrize(
    ("cheaper", "tolerance"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 1e-4),
        ({"gradient_checkpointing": True}, 1e-4),
        ({"bf16": True}, 0.05),
        ({"load_in_4bit": True}, 0.3),
    ],
)
def test_cheaper_settings_learn_the_same(run, plain, tmp_path, cheaper, tolerance):
    run(tmp_path, **cheaper, lr_scheduler_type="constant", max_steps=3)
    assert losses(tmp_path) == pytest.approx(plain, abs=tolerance)


@pytest.mark.long
def test_bfloat16_trains_on_a_cpu_that_is_not_named(settings, tmp_path):
    """Where there is no GPU; where there is one, this trains on it. Either says nothing that a user cannot act on."""
    more = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1, "use_cpu": False}
    command = [sys.executable, "-m", "training", *words(settings(tmp_path, **more))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps                            1" in done.stdout
    assert not re.search("warn|deprecated|Failed to load|kernels", done.stderr, re.IGNORECASE), done.stderr


def test_cached_encoder_encodes_a_window_once_and_keeps_the_rows_of_the_clip(run, trained, tmp_path, monkeypatch):
    cache, trimmed, num_windows = tmp_path / "cache", {"audio_tokens": "trimmed"}, []
    forward = WhisperEncoder.forward

    def count(self, windows, **kwargs):
        num_windows.append(len(windows))
        return forward(self, windows, **kwargs)

    run(tmp_path / "trimmed", **trimmed)
    monkeypatch.setattr(WhisperEncoder, "forward", count)
    # Each run is an epoch and a half of 16 clips of 1 s, 50 of the 150 rows in a window; the second needs all of them.
    for name, more, num_encoded, num_rows, expected in (
        ("cached", trimmed, 16, 50, losses(tmp_path / "trimmed")),
        ("fixed", {}, 32, 150, losses(trained)),
        ("again", trimmed, 32, 150, losses(tmp_path / "trimmed")),
    ):
        run(tmp_path / name, **more, encoder_cache=cache)
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-5)
        assert sum(num_windows) == num_encoded
        sizes = [len(load_file(path)["last_hidden_state"]) for path in cache.rglob("*.safetensors")]
        assert sizes == [num_rows] * 16


def test_damaged_entries_of_the_encoder_cache_are_encoded_again(start, tmp_path, caplog, monkeypatch):
    model = AutoModel.from_pretrained(start, trust_remote_code=True)
    windows = torch.randn(6, model.config.audio_config.num_mel_bins, 300, generator=torch.Generator().manual_seed(0))
    expected = model.model.audio_encoder(windows).last_hidden_state
    encoder = CachedEncoder.of(model.model.audio_encoder, str(tmp_path))
    paths = []
    for window in windows:  # one at a time, so that it is known whose file is new
        encoder(window[None])
        paths += {*encoder.folder.iterdir()} - {*paths}
    contents, transposed = [path.read_bytes() for path in paths], load_file(paths[3])["last_hidden_state"].T
    paths[0].write_bytes(contents[0][:-128])
    paths[1].write_bytes(contents[1][:-128] + bytes(128))
    paths[2].write_bytes(contents[2][:-4] + b"\xff" * 4)  # NaN
    paths[3].write_bytes(save({"last_hidden_state": transposed.contiguous()}, {"sha256": "0" * 64}))
    paths[4].write_bytes(contents[5])  # of another window
    with caplog.at_level("WARNING"):
        encoded = encoder(windows).last_hidden_state
    torch.testing.assert_close(encoded, expected)
    assert sorted(record.message.split()[0] for record in caplog.records) == sorted(map(str, paths[:5]))
    assert {*encoder.folder.iterdir()} == {*paths}
    monkeypatch.setattr(WhisperEncoder, "forward", None)  # all of them are read
    assert torch.equal(encoder(windows).last_hidden_state, encoded)


def test_only_answers_get_logits(settings, collator, tmp_path, sound):
    args = Arguments(**settings(tmp_path))
    trainer = train.AnswerTrainer(train.load_model(args), args, data_collator=collator)
    answers = ("low", "high and high and low")
    batch = collator([chat(audio(sound(2)), text("Why?"), answer=answer) for answer in answers])
    shapes = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    with torch.no_grad():
        spared, whole = trainer.compute_loss(trainer.model, batch), trainer.model(**batch).loss
    assert spared.item() == pytest.approx(whole.item(), abs=1e-5)
    assert shapes[0] < 30 and shapes[1] == batch["input_ids"].shape[1] > 150


def test_projector_has_a_learning_rate_of_its_own(run, start, tmp_path):
    run(tmp_path, stage="lora", lora_r=4, max_steps=2, learning_rate=1e-2, projector_learning_rate=1e-9)
    learned = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored = load_file(start / "model.safetensors")["model.audio_projector.weight"]
    (projector,) = (tensor for name, tensor in learned.items() if "audio_projector" in name)
    assert torch.allclose(projector, stored.float(), atol=1e-7)
    assert max(tensor.abs().max() for name, tensor in learned.items() if "lora_B" in name) > 1e-3


def test_run_starts_from_an_adapter(run, tmp_path):
    lora = {"stage": "lora", "lora_r": 4, "lora_dropout": 0}
    run(tmp_path / "first", **lora, max_steps=2)
    adapter = tmp_path / "first" / "adapter"
    run(tmp_path / "second", **{**lora, "lora_dropout": 0.3}, max_steps=1, learning_rate=1e-12, adapter=adapter)
    settings = [
        json.loads((tmp_path / name / "adapter/adapter_config.json").read_text()) for name in ("first", "second")
    ]
    assert [each["lora_dropout"] for each in settings] == [0, 0.3]
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)
    with pytest.raises(ValueError, match="is of other arguments: r is 4 there, 8 here"):
        run(tmp_path / "third", **{**lora, "lora_r": 8}, adapter=adapter)


def test_error_rates_are_those_of_the_answers(run, start, tones, tmp_path):
    summary = run(tmp_path / "out", eval=[tones / "test.jsonl"], max_steps=1, max_new_tokens=4)
    processor, model = load(start)
    model = train.PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
    expected, answers = [], []
    for row in load_rows([str(tones / "test.jsonl")]):
        *question, answer = ChatCollator(processor).messages(row)
        expected.append(answer["content"])
        answers.append(normalize(processor.answer(model, [question], max_new_tokens=4)[0]))
    assert summary["eval_wer"] == pytest.approx(jiwer.wer(expected, answers), abs=1e-4)
    assert summary["eval_cer"] == pytest.approx(jiwer.cer(expected, answers), abs=1e-4)


@pytest.mark.parametrize(("name", "processes"), [("fsdp-8-gpus", 8), ("fsdp-nodes", 32)])
def test_fsdp_settings_are_those_of_accelerate(start, name, processes):
    parser = launch.launch_command_parser()
    args, config, _ = launch._validate_launch_command(
        parser.parse_args(["--config_file", str(paths.ROOT / "training" / f"{name}.yaml"), "-m", "training"])
    )
    assert args.use_fsdp and args.num_processes == processes == config.num_processes
    assert args.fsdp_version == 2 and args.mixed_precision == "bf16"
    model = AutoModel.from_pretrained(start, trust_remote_code=True)
    classes = {type(module).__name__ for module in model.modules()}
    # accelerate takes these where the file names none, and fails on one that is not there.
    assert args.fsdp_transformer_layer_cls_to_wrap is None
    assert classes >= set(model._no_split_modules) and "WhisperEncoderLayer" in model._no_split_modules
    assert len(model._no_split_modules) == 3


# One process each; the classes are sharded as accelerate shards them.
FSDP_STEP = """
    import sys
    from datetime import timedelta
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModel

    def step(rank):
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", store, timedelta(seconds=30), rank=rank, world_size=3)
        mesh = torch.distributed.init_device_mesh("cpu", (3,))
        for module in [*model.modules()]:
            if type(module).__name__ in classes.split(","):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.1), torch.load(f"{folder}/batch-{rank}.pt")
        before = model(**batch).loss
        before.backward()
        optimizer.step()
        with torch.no_grad():
            after = model.eval()(**batch).loss
        weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        torch.save(([before.item(), after.item()], weights if rank == 0 else None), f"{folder}/result-{rank}.pt")

    folder, repo, classes = sys.argv[1:]
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).train()
    torch.multiprocessing.start_processes(step, nprocs=3, start_method="fork")
    print("TOKENS")
    """


@pytest.mark.long
def test_processes_of_fsdp_need_not_have_the_same_inputs(repo, processor, fresh_model, photo, sound, tmp_path):
    """One process has audio and a video, one only text, one only pictures; they learn as one process with all rows."""
    settings = yaml.safe_load((paths.ROOT / "training" / "fsdp-8-gpus.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    collator, picture = ChatCollator(processor), image(Image.open(photo).resize((56, 56)))
    contents = [[audio(sound(1)), text("Which?"), video([picture["image"]] * 2)], [text("Why?")], [picture]]
    batches = [collator([chat(*content, answer="low and high")]) for content in contents]
    for rank, batch in enumerate(batches):
        torch.save(batch, tmp_path / f"batch-{rank}.pt")
    classes = ",".join(fresh_model._no_split_modules)
    answer(start_python(FSDP_STEP, str(tmp_path), str(repo), classes, env={**os.environ, "OMP_NUM_THREADS": "1"}))

    model, losses = fresh_model.float().train(), []
    for batch in batches:
        loss = model(**batch).loss
        (loss / len(batches)).backward()
        losses.append(loss.item())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    results = [torch.load(tmp_path / f"result-{rank}.pt") for rank in range(3)]
    with torch.no_grad():
        after = [model.eval()(**batch).loss.item() for batch in batches]
    assert torch.tensor([loss for loss, _ in results]).numpy() == pytest.approx(torch.tensor([losses, after]).T.numpy())
    weights = model.state_dict()
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-5)


def test_kinds_of_audio_tokens(run, start, tmp_path, sound):
    """`both` draws one for each batch, the same for the same rows; what was trained is written down, and built on."""
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    rows = [{**row, "place": f"x:{number}"} for number, row in enumerate([chat(audio(sound(1)))] * 8)]
    lengths = {"fixed": 150, "trimmed": 50}

    def count(audio_tokens: str, *batch) -> list[int]:
        ids = ChatCollator(processor, audio_tokens=audio_tokens)([*batch])["input_ids"]
        return (ids == processor.audio_token_id).sum(1).tolist()

    for audio_tokens, length in lengths.items():
        assert count(audio_tokens, *rows[:2]) == [length] * 2
    counts = [count("both", row)[0] for row in rows + rows]
    assert {*counts} == {*lengths.values()} and counts[:8] == counts[8:]

    run(tmp_path / "run", audio_tokens="both", max_steps=2, export=tmp_path / "export")
    exported = AutoProcessor.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert (exported.audio_tokens, exported.trained_audio_tokens) == ("fixed", "both")
    learned = tmp_path / "run" / "audio_projector.safetensors"
    assert checkpoints.read_rules(learned)["trained_audio_tokens"] == "both"
    trimmed = build(checkpoint=start, projector=learned, output=tmp_path / "trimmed", audio_tokens="trimmed")
    for folder in (trimmed, build(checkpoint=trimmed, output=tmp_path / "again")):
        built = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert (built.audio_tokens, built.trained_audio_tokens) == ("trimmed", "both")


def test_other_content_under_the_same_name_is_another_run(settings, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    args = Arguments(**settings(tmp_path / "run"))
    refuse_another_run(args)
    path = tmp_path / "run" / "arguments.json"
    arguments = json.loads(path.read_text())
    arguments["content of data"][0]["files"] = "another"
    path.write_text(json.dumps(arguments))
    with pytest.raises(ValueError, match="another run: files of train.jsonl was another, is [0-9a-f]{64}"):
        refuse_another_run(args)
    del arguments["content of data"][0]["files"]
    arguments["content of model"]["weights"]["model.safetensors"] = "another"
    path.write_text(json.dumps(arguments))
    with pytest.raises(ValueError, match="model.safetensors of weights of content of model was 'another', is '"):
        refuse_another_run(args)
    del arguments["content of model"], arguments["content of adapter"]  # of a run of an earlier release
    path.write_text(json.dumps(arguments))
    refuse_another_run(args)


def test_a_run_that_ended_keeps_its_best_adapter(run, tones, tmp_path):
    """Here that of the greatest loss, which is the first one."""
    rows = write_lines(tones / "one.jsonl", [json.loads((tones / "train.jsonl").read_text().splitlines()[0])])
    settings = {"eval": [rows], "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    adapters = []
    for _ in range(2):
        run(tmp_path / "out", **settings, max_new_tokens=1)
        adapters.append((tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes())
    best, last = (tmp_path / "out" / f"checkpoint-{step}" / "adapter_model.safetensors" for step in (1, 2))
    assert adapters == 2 * [best.read_bytes()] and best.read_bytes() != last.read_bytes()
