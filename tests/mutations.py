"""
python tests/mutations.py [--only NAME ...] [--jobs 2]: breaks the code in 60 places, one at a time, and runs the tests
that have to notice. Prints a table, and fails if fewer than 95% of the mutations are killed. `make test` leaves it out.

Each mutation is made in a copy of the checkout. Its tests first run without it, as tests that fail anyway tell nothing.
"""

import argparse
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
NEEDED = 0.95  # share of the mutations that have to be killed
TIMEOUT = 1200  # seconds for the tests of one mutation; a mutation that makes them hang is killed

# A file, and its mutations: name, tests (arguments of pytest, whose file is tests/test_<first>.py), old text, new text.
# The old text occurs exactly once.
TABLE = """
modeling_qwen2_audio_vl.py
encoder-learns: modeling -k backbone_alone
- model.base_model.audio_encoder.requires_grad_(False)
+ pass
encoder-trains: modeling -k frozen_encoder
- self.audio_encoder.eval()
+ pass
encoder-never-learns: modeling -k frozen_encoder
- torch.is_grad_enabled() and self.audio_encoder_learns
+ False
rows-of-padding: trimmed -k mask_marks
- rows[is_kept] if
+ rows.flatten(0, 1)[: int(is_kept.sum())] if
windows-reversed: modeling -k joined_windows
- .transpose(1, 2).flatten(0, 1)
+ .transpose(1, 2).flip(1).flatten(0, 1)
mel-bins-unchecked: modeling -k another_extractor
- input_features.ndim != 3 or input_features.shape[1:] != (bins, frames)
+ input_features.ndim != 3
mask-length-unchecked: trimmed -k wrong_numbers
- shape[-1] % frames or shape.numel() != len(input_features) * frames
+ shape[-1] % frames
mask-gap-unchecked: trimmed -k wrong_numbers
- (mask[:, 1:] & ~mask[:, :-1]).any()
+ (mask[:, 1:] & ~mask[:, :-1]).all()
wrong-embedded-token: modeling -k inputs_embeds
- token = torch.tensor(self.config.audio_token_id,
+ token = torch.tensor(self.config.audio_bos_token_id,
too-few-embeddings: modeling -k missing_or_extra
- fits = num_tokens == rows.sum()
+ fits = num_tokens >= rows.sum()
clips-end-anywhere: trimmed -k coincide
- if rows.ndim:
+ if False:
text-unchecked: modeling -k missing_or_extra
- elif is_prefill and not is_embedded:
+ elif False:
step-waits: modeling -k does_not_wait
- elif is_prefill and not is_embedded:
+ elif not is_embedded:
positions-not-kept: modeling -k bring_an_image
- if is_prefill and isinstance(cache, Cache):
+ if False:
whole-model-for-vllm: modeling -k vllm
- _attn_implementation == "vllm"
+ _attn_implementation == "none"
drafts-on-a-cache: modeling -k starts_without_a_cache
- if drafts and
+ if not drafts and
audio-in-text-batches: ecosystem -k continuous
- placeholders = {self.config.audio_token_id,
+ placeholders = {
prompt-shorter-than-cache: modeling -k needs_its_audio
- if num_new <= 0:
+ if False:
beams-interleaved: modeling -k beams_keep
- [row for row in embeddings.split(tokens) for _ in range(expand_size)]
+ [row for _ in range(expand_size) for row in embeddings.split(tokens)]
old-audio-refused: modeling -k reused_cache
- is_audio if int(is_audio.sum()) == int(rows.sum()) else is_new
+ is_new
features-keep-their-dtype: modeling -k bf16
- else tensor.to(weight.device, dtype)
+ else tensor
audio-twice: modeling -k precomputed
- audio.features is not None and audio.outputs is not None:
+ False:
mrope_positions.py
audio-type: modeling -k count_audio_as_text
- AUDIO_TOKEN_TYPE = 3
+ AUDIO_TOKEN_TYPE = 4
video-as-image: modeling -k token_types
- is_image + 2 * is_video
+ is_image + is_video
position-off-by-one: modeling -k bring_an_image
- next_positions = positions.cummax(1).values + 1
+ next_positions = positions.cummax(1).values
padding-moves-on: dialogues -k 0
- (mask.to(next_positions.device) * ~is_known)
+ (~is_known).long()
rows-mixed-up: dialogues -k 0
- num_equal.argmax(1)
+ num_equal.argmin(1)
first-query-for-last: modeling -k any_form
- attention_mask[:, 0, -1]
+ attention_mask[:, 0, 0]
pictures-without-positions: modeling -k without_positions
- if not hasattr(cache, "mrope_positions") and
+ if False and
configuration_qwen2_audio_vl.py
tokens-rounded-down: trimmed -k tokens_of_a_clip
- -(-num_samples // (HOP_LENGTH * ENCODER_STRIDE))
+ num_samples // (HOP_LENGTH * ENCODER_STRIDE)
vocabulary-off-by-one: configuration -k contradictions
- 0 <= token_id < self
+ 0 <= token_id <= self
heads-unchecked: configuration -k contradictions
- if self.audio_config.d_model % self.audio_config.encoder_attention_heads:
+ if False:
auto-class-lost: configuration -k auto_class
- "AutoModelForCausalLM": MODELING
+ "AutoModelForVision2Seq": MODELING
processing_qwen2_audio_vl.py
frame-too-many: trimmed -k mask_marks
- places < ENCODER_STRIDE * count.tokens
+ places <= ENCODER_STRIDE * count.tokens
end-before-audio: processing
- self.audio_bos_token + self.audio_token * num_tokens + self.audio_eos_token
+ self.audio_bos_token + self.audio_eos_token + self.audio_token * num_tokens
padded-on-the-right: serving -k batch_gives
- (length - tensor.shape[1], 0)
+ (0, length - tensor.shape[1])
no-warning-of-tokens: trimmed -k asked_as_it_was
- (None, "both", asked)
+ (None, "both", "fixed", "trimmed")
prompt-too-long: processing
- if num_tokens > limit:
+ if False:
audio_utils.py
first-channel: audio_utils -k channels
- samples.mean(channel_axes[0])
+ samples.select(channel_axes[0], 0)
nan-taken: audio_utils -k refused
- if not math.isfinite(peak):
+ if False:
silence-kept: audio_utils -k resampl
- [silence * sr // common :]
+ [0:]
given-peaks-cut: audio_utils -k overshoots
- 1.0 if is_file else max(1.0, peak)
+ 1.0
floor-too-low: audio_utils -k log_mel
- keepdim=True) - 2.0
+ keepdim=True) - 3.0
audio_download.py
private-addresses: limits -k public
- if self.public_only else ():
+ if False else ():
local-files: limits -k public
- if not public_only and len(path) < 4096
+ if len(path) < 4096
redirects-anywhere: limits -k downloads
- not in ("http", "https"):
+ not in ("http", "https", "ftp", "file"):
download-cut-short: limits -k downloads
- if response.length:
+ if False:
audio_decoding.py
limit-of-high-rates: limits -k silence
- min(frame.sample_rate, FULL_RATE)
+ max(frame.sample_rate, FULL_RATE)
loudest-channel: audio_utils -k stereo
- scaled.mean(axis=0,
+ scaled.sum(axis=0,
collator.py
prompt-learned: training -k labels_are
- (inputs.pop("assistant_masks") == 0) |
+ (inputs.pop("assistant_masks") < 0) |
control-tokens-learned: training -k bad_rows
- if token in text:
+ if token == text:
handler.py
many-items: serving -k bad_requests
- if count > MAX_ITEMS:
+ if count > 2 * MAX_ITEMS:
long-text: serving -k bad_requests
- if length > MAX_TEXT:
+ if False:
batch-too-large: serving -k batch
- <= max_tokens
+ >= max_tokens
evaluation/scoring.py
failed-rows-scored: scoring
- if row.answer is not None]
+ if True]
silence-is-an-error: scoring
- if row.reference not in NOTHING_SAID]
+ ]
deletions-forgotten: scoring
- self.insertions + self.deletions + self.substitutions
+ self.insertions + self.substitutions
repeating-by-size: scoring
- > REPEATING
+ < REPEATING
publishing/checkpoints.py
shapes-unchecked: upload -k wrong_parts
- elif tuple(tensor.shape) != tuple(expected[name].shape):
+ elif False:
decoder-of-whisper: upload -k weights_are_those
- not name.startswith("model.audio_encoder.")
+ False
"""


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


def read_table() -> list[Mutation]:
    mutations, file, lines = [], "", iter(TABLE.strip().splitlines())
    for line in lines:
        if line.endswith(".py"):
            file = line
        else:
            name, tests = line.split(": ")
            mutations.append(
                Mutation(name, file, next(lines).removeprefix("- "), next(lines).removeprefix("+ "), tests)
            )
    return mutations


def copy_checkout(folder: Path) -> Path:
    """Copies what git tracks, as it is in the working tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: str) -> tuple[str, str]:
    """Runs tests in a copy of the checkout. Returns "passed", "failed" or "broken", and the end of the output."""
    name, *options = shlex.split(tests)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py", *options]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "failed", f"longer than {TIMEOUT} s"
    # pytest exits with 1 if a test fails, and with 2 if a test file cannot be imported.
    verdict = {0: "passed", 1: "failed", 2: "failed"}.get(done.returncode, "broken")
    return verdict, (done.stdout + done.stderr)[-2000:]


def run_mutation(folder: Path, mutation: Mutation) -> tuple[str, str]:
    """Runs the tests of a mutation in a copy of the checkout, which is left as it was. Returns as `run_tests` does."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return run_tests(folder, mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")


def check_table(mutations: list[Mutation]):
    """Exits if a name is used twice or an old text does not occur exactly once."""
    names = [mutation.name for mutation in mutations]
    problems = [f"{name} is used twice" for name in set(names) if names.count(name) > 1]
    for mutation in mutations:
        count = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1:
            problems.append(f"{mutation.name}: {mutation.file} has {mutation.old!r} {count} times, expected once")
    if problems:
        sys.exit("\n".join(problems))


def run_all(jobs: list, num_workers: int, run) -> list[tuple[str, str]]:
    """Calls `run(folder, job)` for every job, each worker in a copy of the checkout of its own. Prints the progress."""
    folders = queue.Queue()

    def work(job):
        folder, start = folders.get(), time.monotonic()
        try:
            verdict, output = run(folder, job)
        finally:
            folders.put(folder)
        print(
            f"{getattr(job, 'name', job)}: {verdict} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
        )
        return verdict, output

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(num_workers) as pool:
        for number in range(num_workers):
            folders.put(copy_checkout(Path(temporary) / str(number)))
        return list(pool.map(work, jobs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutations")
    parser.add_argument("--list", action="store_true", help="list the mutations and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="run so many mutations at once (default: 1)")
    parser.add_argument("--skip-baseline", action="store_true", help="do not run the tests without a mutation first")
    arguments = parser.parse_args()
    table = read_table()
    mutations = [each for each in table if not arguments.only or each.name in arguments.only]
    if unknown := set(arguments.only or ()) - {each.name for each in mutations}:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}; --list shows all")
    check_table(table)
    if arguments.list:
        print("\n".join(f"{each.name:28}{each.file:34}{each.tests}" for each in mutations))
        return

    if not arguments.skip_baseline:
        selections = list(dict.fromkeys(each.tests for each in mutations))
        verdicts = run_all(selections, arguments.jobs, run_tests)
        for tests, (verdict, output) in zip(selections, verdicts, strict=True):
            if verdict != "passed":
                sys.exit(f"{tests}: {verdict} without a mutation\n{output}")
    verdicts = run_all(mutations, arguments.jobs, run_mutation)
    words = {"failed": "killed", "passed": "SURVIVED", "broken": "NO TESTS RUN"}
    print("| mutation | file | tests | result |\n|---|---|---|---|")
    for mutation, (verdict, _) in zip(mutations, verdicts, strict=True):
        print(f"| {mutation.name} | {mutation.file} | {mutation.tests} | {words[verdict]} |")
    killed = sum(verdict == "failed" for verdict, _ in verdicts)
    print(f"\n{killed} of {len(mutations)} killed")
    if killed < NEEDED * len(mutations):
        sys.exit(1)


if __name__ == "__main__":
    main()
