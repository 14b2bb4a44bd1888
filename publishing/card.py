"""The model card: the project's README with the facts of a build, between marks that a reader does not see."""

import re
from pathlib import Path

from huggingface_hub import ModelCard

from configuration_qwen2_audio_vl import FAMILIES, tokens_per_window
from publishing.paths import ROOT, Origin, weights_of, write_checksums


EVALUATION = "evaluation"  # the folder of the predictions that the scores in a card come from
ENTRIES = (
    ".eval_results/open_asr_leaderboard.yaml"  # those for a leaderboard: https://huggingface.co/docs/hub/eval-results
)
MEASURED_BASE = "Qwen2-VL"  # of which the figures in the README are
NAMES = {"text": "text", "classes": "one of a few words", "json": "JSON"}  # of the kinds of answers
SECTIONS = {  # what begins and ends a section
    "source": ("<!-- source only -->\n", "<!-- end of source only -->\n"),
    "facts": ("<!-- facts of the build -->\n", "<!-- end of the facts -->\n"),
    "results": ("<!-- results -->\n", "<!-- end of results -->\n"),
    "gguf": ("<!-- llama.cpp -->\n", "<!-- end of llama.cpp -->\n"),
}


def replace_section(text: str, name: str, content: str) -> str:
    """Puts content between the marks of a section; a text without these marks gets them at its end."""
    begin, end = SECTIONS[name]
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if closed:
        return before + begin + content + end + after
    return f"{text.rstrip()}\n\n{begin}{content}{end}" if content else text


def name_repo(text: str, repo: str) -> str:
    """Assigns a folder or Hub id to `REPO`, which the first code block of the card loads."""
    return re.sub(r"^REPO = .*$", lambda _: f'REPO = "{repo}"', text, count=1, flags=re.MULTILINE)


def make_card(origins: dict[str, Origin], is_trained: bool, tensors: dict, config, processor) -> ModelCard:
    """Makes the card of a new folder. The tensors are the model's own by name; meta tensors suffice."""
    untrained = "**The projector is untrained: answers about audio mean nothing until it is trained.**"
    facts = ["The projector is trained." if is_trained else untrained, ""]
    family = FAMILIES[config.model_type]
    if family.base_name != MEASURED_BASE:
        facts.append(
            f"- the base is {family.base_name}; figures of speed below are those of {MEASURED_BASE} with audio"
        )
    for role, (_, name, commit) in origins.items():
        facts.append(f"- {role}: {name}" + (f" at commit `{commit}`" if commit else " (a directory)"))
    parameters, size = sum(tensor.numel() for tensor in tensors.values()), sum(t.nbytes for t in tensors.values())
    facts.append(f"- {parameters:,} parameters in {str(config.dtype).removeprefix('torch.')}, {size / 1e9:.2f} GB")
    extractor, positions = processor.feature_extractor, config.text_config.max_position_embeddings
    window = f"{extractor.chunk_length} s, {positions:,} positions"
    facts.append(f"- {tokens_per_window(extractor):,} audio tokens for each window of {window}")
    facts += map(describe_task, processor.trained_tasks or ())

    text = replace_section((ROOT / "README.md").read_text(encoding="utf-8"), "source", "")
    card = ModelCard(name_repo(replace_section(text, "facts", "\n".join(facts) + "\n"), "."))
    types = {"qwen2_audio_vl": config.model_type, "qwen2_vl": family.base_type}
    card.data.tags = [types.get(tag, tag) for tag in card.data.tags]
    card.data.base_model = [origin.name for origin in origins.values() if origin.commit] or None
    card.data.base_model_relation = card.data.base_model_relation if card.data.base_model else None
    return card


def describe_task(task: dict) -> str:
    """A line about a task that a model was trained to do."""
    line = f'- trained to answer "{" ".join(task["instruction"].split())}" with {NAMES[task["answers"]]}'
    if task.get("before") is None or task.get("after") is None:
        return line
    before, after = f"{100 * task['before']:.1f}%", f"{100 * task['after']:.1f}%"
    return f"{line}; {task['metric']} {before} before the last training and {after} after it"


def save_card(folder: Path, card: ModelCard):
    """Writes the card of a folder, and new checksums of all files except the weights."""
    card.save(folder / "README.md")
    write_checksums(folder, weights_of(folder))
