"""Which rows are trained on, and how long they are."""

import math
from collections.abc import Callable

from accelerate.utils import gather_object
from datasets import IterableDataset
from torch.utils.data import DataLoader, Subset
from transformers.utils import logging

from collator import BadRow, ChatCollator, content_of, place_of, prefix_errors
from training.arguments import Arguments


logger = logging.get_logger(__name__)


def map_rows(dataset, function: Callable[[dict], object], args: Arguments) -> list:
    """Calls a function on every row, shared among processes and their data loader workers. The results are in order."""
    mine = range(args.process_index, len(dataset), args.world_size)
    workers = args.dataloader_num_workers
    loader = DataLoader(Subset(dataset, mine), batch_size=None, collate_fn=function, num_workers=workers)
    results = gather_object([*zip(mine, loader, strict=True)])
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]


def select_rows(dataset, collator: ChatCollator, args: Arguments):
    """
    Refuses bad rows by a ValueError that counts and names them or, with `--skip-bad-rows`, leaves them out. Adds the
    length of each row if rows are grouped by length. Clips and pictures are opened only for `--skip-bad-rows`, and to
    count tokens where the rows have no length.
    """
    is_grouped = args.train_sampling_strategy not in ("random", "sequential")
    length_name = args.given_length if is_grouped else None
    opens_files = args.skip_bad_rows or (is_grouped and length_name is None)

    def measure(row: dict) -> float | str:
        """The length of a row, given or in tokens (of its messages, if no file is opened), or what is wrong with it."""
        try:
            length = collator.inputs(row)["input_ids"].shape[1] if opens_files else len(collator.messages(row))
            return length if length_name is None else read_length(row, length_name)
        except BadRow as error:
            return str(error)

    if isinstance(dataset, IterableDataset):
        return leave_out_bad_rows(dataset, measure) if args.skip_bad_rows else dataset  # training refuses others
    places, first = list(dataset["place"]), {}
    for index, place in enumerate(places):  # with `--weights` a row can be drawn several times
        first.setdefault(place, index)
    measured = dict(zip(first, map_rows(dataset.select(first.values()), measure, args), strict=True))
    lengths = [measured[place] for place in places]
    good = [index for index, length in enumerate(lengths) if not isinstance(length, str)]
    if bad := [error for error in measured.values() if isinstance(error, str)]:
        text = f"{len(bad)} of {len(measured)} rows cannot be used:\n" + "\n".join(bad[:20] + ["..."] * (len(bad) > 20))
        if not args.skip_bad_rows or not good:
            raise ValueError(text)
        logger.warning(text)
        dataset = dataset.select(good)
    if is_grouped:
        if args.length_column_name in dataset.column_names:  # rows of JSON lines have it in `line` instead
            dataset = dataset.remove_columns(args.length_column_name)
        dataset = dataset.add_column(args.length_column_name, [lengths[index] for index in good])
    return dataset


def read_length(row: dict, name: str) -> float:
    """The length that a row has under a name. Raises a BadRow if that is no positive number."""
    with prefix_errors(place_of(row)):
        length = content_of(row).get(name)
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not 0 < length < math.inf:
            raise ValueError(f"the length `{name}` is {length!r}; expected a positive number")
        return length


def leave_out_bad_rows(dataset: IterableDataset, measure: Callable[[dict], float | str]) -> IterableDataset:
    """Leaves out streamed rows that cannot be used, and counts and names them."""
    errors = []

    def is_good(row: dict) -> bool:
        result = measure(row)
        if isinstance(result, str):
            errors.append(result)
            logger.warning(f"Left out, {len(errors)} so far: {result}")
        return not isinstance(result, str)

    return dataset.filter(is_good)
