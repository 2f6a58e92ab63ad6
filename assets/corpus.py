"""Texts of a corpus, for pop.load_corpus: .txt, .jsonl or .parquet files, or a hub dataset."""
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from assets.checks import fail, one_line

UTF8 = dict(encoding="utf-8-sig", encoding_errors="replace")    # -sig: without a byte order mark
# A line of .jsonl is read as a text first: then only the column that is used must be in order.
FORMATS = {
    ".txt": dict(path="text", sample_by="paragraph", **UTF8),    # documents end at blank lines
    ".jsonl": dict(path="text", **UTF8),
    ".parquet": dict(path="parquet"),
}


def read_texts(name: str, revision: str | None, columns: Sequence[str],
               seed: int) -> tuple[str, Iterator[str | None]]:
    """The first of `columns` that holds texts, and the text of each row; None where it has none.

    Exits with one line if the corpus cannot be read.
    """
    def fail_reading(error: Exception) -> None:
        fail(f"--corpus {name}: cannot be read, give a hub dataset or a {'/'.join(FORMATS)} file "
             f"({one_line(error)})")

    def texts() -> Iterator[str | None]:
        try:
            for row in chain(first, rows):
                text = row.get(column)
                # A million characters is about a novel; to split more takes gigabytes.
                yield text[:1_000_000] if isinstance(text, str) else None
        except Exception as error:    # the library raises many kinds
            fail_reading(error)

    try:
        rows = read_rows(name, revision, seed)
        first = list(islice(rows, 1000))    # in shuffled order, so no bad stretch decides
        column = text_column(first, columns)
    except Exception as error:
        fail_reading(error)
    return column, texts()


def read_rows(name: str, revision: str | None, seed: int) -> Iterator[dict[str, Any]]:
    """Rows in a shuffled order; a hub dataset is streamed, never downloaded whole.

    Raises ValueError, or what the library raises, if it cannot be read.
    """
    from datasets import load_dataset
    source = dict(path=name, revision=revision)    # a hub dataset
    files = sorted(Path(name).rglob("*")) if Path(name).is_dir() else [Path(name)]
    files = [file for file in files if file.suffix in FORMATS]
    formats = {file.suffix for file in files}
    if len(formats) > 1:
        raise ValueError("the folder has files of more than one of these formats")
    if files:
        source = FORMATS[files[0].suffix] | dict(data_files=[str(file) for file in files])
    rows = load_dataset(**source, split="train", streaming=True)
    for row in rows.shuffle(seed=seed, buffer_size=10_000):
        if formats == {".jsonl"}:
            row = json_row(row["text"])
        yield row


def json_row(line: str) -> dict[str, Any]:
    """A line of .jsonl; a blank one is an empty row. Raises ValueError if it is no object."""
    try:
        row = json.loads(line) if line.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON in line {line[:80]!r}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"no JSON object in line {line[:80]!r}")
    return row


def text_column(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The first of `names` that is a column with a text in any of the rows. Raises ValueError."""
    columns = {column for row in rows for column, value in row.items() if isinstance(value, str)}
    for name in names:
        if name in columns:
            return name
    raise ValueError(f"has texts in columns {sorted(columns)}, needs one of {', '.join(names)}")
