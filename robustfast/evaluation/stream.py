"""One pass over the data: every measurement of every image, into one table, resumable and shared by ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustfast import disk, ranks
from robustfast.evaluation import table
from robustfast.evaluation.measurements import Batch, Measurement, settings
from robustfast.evaluation.models import checked_images, checked_labels, evaluating, logits_of

FORMAT = 2
TABLE = "images.npz"
PARTS = "images.parts"
ABOUT = "about.json"
ROWS, SECONDS = 256, 10.0  # a part is written after as many images, or as long a time


def measure(
    model: Any,
    batches: Iterable[Sequence[Tensor]],
    measurements: Sequence[Measurement],
    out: Path,
    *,
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    about: dict[str, Any] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> tuple[table.Columns, dict[str, Any]]:
    """The table of all measurements of all images, which is also written to ``out``/images.npz.

    Nothing holds the whole data set: batches come one after the other and go. A row depends on its image, label and id
    alone, not on the size and order of the loader's batches, the ranks and interruptions. Whole parts of the table lie
    in ``out``/images.parts until all are there; an interrupted pass goes on from them. Under torch.distributed the
    ranks share the images, and all return the same.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        batches: (images, labels) or (images, labels, ids); images floating in [0, 1] or uint8 (taken as x / 255), ids
            int64 and each once, by default the position in the data.
        measurements: those of :mod:`robustfast.evaluation.measurements`, with a name of their own each.
        seed: of all noise.
        batch_size: images in a call of the model. A model whose last bits depend on that may move those of its scores;
            the noise does not move.
        about: what else identifies the pass, in JSON's types: it goes on only from parts that have the same.
        on_images: called with the number of images that are done so far, by this rank.

    Returns:
        (columns, about) as :func:`robustfast.evaluation.table.read` gives them.

    Raises:
        TypeError, ValueError: images, labels, ids or what the model returns are not as described, an id comes twice, or
            ``out`` holds another pass.
    """
    about = _as_json(
        {
            "format": FORMAT,
            "measurements": [settings(measurement) for measurement in measurements],
            "model": fingerprint(model),
            "seed": seed,
            **(about or {}),
        }
    )
    rank, world = ranks.rank(), ranks.count()
    if not _finished(out, about):
        done = _begin(out, about, rank)
        writer = _Writer(out / PARTS)
        count = 0
        try:
            for number, block in enumerate(blocks(batches, batch_size)):
                if number % world == rank:
                    fresh = torch.tensor([int(id_) not in done for id_ in block[2]], dtype=torch.bool)
                    if fresh.any():
                        writer.add(_rows(model, block, fresh, measurements, seed, batch_size, torch.device(device)))
                    count += len(fresh)
                    if on_images is not None:
                        on_images(count)
            writer.flush()
        except BaseException:
            if not any((out / PARTS).glob("*.npz")):  # nothing worth going on from
                shutil.rmtree(out / PARTS, ignore_errors=True)
            raise
        _barrier()
        if rank == 0:
            _finish(out, about)
    _barrier()
    if rank == 0:
        shutil.rmtree(out / PARTS, ignore_errors=True)
    return table.read(out / TABLE)


def blocks(batches: Iterable[Sequence[Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images floating in [0, 1], labels int64, ids int64) in blocks of ``size``, whatever the loader's batches are."""
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    count, position = 0, 0
    for batch in batches:
        images, labels = batch[0], torch.as_tensor(batch[1])
        images = images / 255 if images.dtype == torch.uint8 else images
        ids = torch.as_tensor(batch[2]) if len(batch) > 2 else torch.arange(position, position + len(images))
        checked_images(images, ids.to(images.device))
        checked_labels(labels.to(images.device), images)
        held.append((images, labels.long(), ids))
        count, position = count + len(images), position + len(images)
        while count >= size:
            whole = _cat(held)
            yield tuple(part[:size] for part in whole)  # type: ignore[misc]
            held, count = [tuple(part[size:] for part in whole)], count - size  # type: ignore[list-item]
    if count:
        yield _cat(held)


def _cat(held: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    images, labels, ids = zip(*held, strict=True)
    return torch.cat(images), torch.cat(labels), torch.cat(ids)


def _rows(model, block, fresh, measurements, seed, batch_size, device) -> table.Columns:
    images, labels, ids = (part[fresh].to(device) for part in block)
    with torch.no_grad(), evaluating(model):
        logits_of(model, images[:1], labels[:1])  # a model that does not fit fails here, before anything costs time
    batch = Batch(images, labels, ids, seed, batch_size)
    columns = {table.ID: ids, "label": labels.int(), "pixels": _hashes(images)}
    for measurement in measurements:
        columns |= measurement(model, batch)
    return {name: _stored(column) for name, column in columns.items()}


def _stored(column: Tensor) -> np.ndarray:
    column = column.detach().cpu()
    return (column.float() if column.is_floating_point() else column).numpy()


def _hashes(images: Tensor) -> Tensor:
    """int64 (N,): a hash of each image's pixels, by which two tables are known to be of the same images."""
    rows = images.detach().cpu().float().contiguous().flatten(1).numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def fingerprint(model: Any) -> str | None:
    """A hash of the model's weights and buffers; None for a plain function."""
    if not isinstance(model, nn.Module):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Writer:
    """Rows on their way to the disk, in parts that are whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.since = folder, [], time.monotonic()  # type: ignore[var-annotated]

    def add(self, rows: table.Columns) -> None:
        self.held.append(rows)
        if sum(len(part[table.ID]) for part in self.held) >= ROWS or time.monotonic() - self.since > SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.held:
            rows = table.join(self.held)
            ids = rows[table.ID]
            table.write(self.folder / f"{ids[0]}-{ids[-1]}-{len(ids)}.npz", rows, {})
        self.held, self.since = [], time.monotonic()


def _as_json(about: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(about))


def _finished(out: Path, about: dict[str, Any]) -> bool:
    """Whether the table is there; ValueError if it is another's."""
    if (out / TABLE).exists():
        _expect_same(out / TABLE, table.read(out / TABLE)[1], about)
    return (out / TABLE).exists()


def _begin(out: Path, about: dict[str, Any], rank: int) -> set[int]:
    """The ids that an interrupted pass has done already."""
    parts = out / PARTS
    if rank == 0:
        parts.mkdir(parents=True, exist_ok=True)
        if not (parts / ABOUT).exists():
            disk.write_json(parts / ABOUT, about)
    _barrier()
    _expect_same(parts, disk.read_json(parts / ABOUT), about)
    return {int(id_) for part in parts.glob("*.npz") for id_ in table.read(part)[0][table.ID]}


def _expect_same(place: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ValueError(f"{place}: holds another evaluation, with other {name}; choose another folder")


def _finish(out: Path, about: dict[str, Any]) -> None:
    parts = [table.read(part)[0] for part in sorted((out / PARTS).glob("*.npz"))]
    if not parts:
        raise ValueError("batches: expected at least one image, got none")
    table.write(out / TABLE, table.join(parts), about)


def _barrier() -> None:
    if ranks.count() > 1:
        dist.barrier()
