"""Results of a study as a CSV file that grows row by row and is never half written."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from nas.checkpoint import write_atomically
from nas.errors import DataError


class Rows:
    """The rows of one file, in the order in which they came.

    Args:
        columns: of the file; another file's are refused.
        own: column and value that all rows share, by which rows of another study are recognised.

    Raises:
        DataError: the file has other columns, or a row of another study.
    """

    def __init__(self, path: Path, columns: Sequence[str], own: tuple[str, str]) -> None:
        self._path, self._columns = path, list(columns)
        self.rows: list[dict[str, str]] = []
        if not path.exists():
            return
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if table.fieldnames != self._columns:
                raise DataError(
                    f"{path} has the columns {table.fieldnames}, and this study writes "
                    f"{self._columns}: name another --results"
                )
            self.rows = list(table)
        name, value = own
        if others := {row[name] for row in self.rows} - {value}:
            raise DataError(
                f"{path} has rows of the {name} {', '.join(sorted(others))}, and this one is "
                f"{value}: settings have changed since; name another --results"
            )

    def append(self, row: Mapping[str, str]) -> None:
        """Add a row. A process that is killed meanwhile leaves the file with it or without it.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self.rows.append(dict(row))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_atomically(self._path, text.getvalue().encode())
