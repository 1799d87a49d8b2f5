"""Keys and values of the positions seen so far, for every layer and row.

A row holds positions 0 .. n - 1, each row its own n. Position p lies in slot p of its row's room,
or, where the model attends through a window, in slot p % R of a room of R slots that goes round:
what falls out of the window is overwritten. A room that is not whole at first grows by doubling.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops

PAGE = 64  # slots; a rolling room is a whole number of pages
SPARE = PAGE  # slots of a rolling room beyond its window
FEW = 16  # new positions that `ops.attention_decode` is for


def rolling_room(window: int) -> int:
    """Slots of a room that goes round: the window and SPARE more, in whole pages."""
    return -(-(window + SPARE) // PAGE) * PAGE


class KVCache:
    """Keys and values of B rows.

    Args:
        n_layer, batch_size, n_head, head_dim: the sizes; n_head is that of keys and values.
        length: the most positions of a row.
        window: if given, a query sees the window newest positions only, its own included. The room
            then has `rolling_room(window)` slots where that is less than length.
        room: slots set aside at first; length if None. A rolling room is set aside whole.
        device, dtype: of keys and values.

    Attributes:
        length: positions of the row that holds the most.
        at: (B,) int32 on the device, what each row holds, once `track` was called; or None.
        seen: (B, 1, T, slots) bool, what each query sees, if `begin` gave positions for each row.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        length: int,
        n_head: int,
        head_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        window: int | None = None,
        room: int | None = None,
    ) -> None:
        self.limit, self.window = length, window
        self.rolls = window is not None and rolling_room(window) < length
        slots = length if room is None else min(room, length)
        if window is not None and self.rolls:
            slots = rolling_room(window)
        shape = (2, batch_size, slots, n_head, head_dim)
        # Not empty: what is hidden has weight 0, and 0 times what memory may hold is not 0.
        self._rooms = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self.length = 0
        self.at: Tensor | None = None
        self._lengths: list[int] | None = None  # of each row, where they differ
        self._tops = [0] * batch_size  # if it rolls: the most a row held since it was empty
        self._way, self._start = "fresh", 0
        self._places: Tensor | None = None
        self.seen: Tensor | None = None
        self._table: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._rooms[0].shape[1]

    @property
    def slots(self) -> int:
        """Positions that the room of a row has place for."""
        return self._rooms[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all rooms: 2 n_layer B slots n_head head_dim elements."""
        return sum(room.nbytes for room in self._rooms)

    @property
    def lengths(self) -> list[int]:
        """Positions that each row holds."""
        return [self.length] * self.batch_size if self._lengths is None else list(self._lengths)

    def room(self, layer: int) -> Tensor:
        """A layer's keys and values, (2, B, slots, n_head, head_dim)."""
        return self._rooms[layer]

    def track(self) -> None:
        """Keep what the rows hold in `at`, on the device, from now on.

        Few new tokens are then written and attended to by `ops.attention_decode` where kernels
        run, and the host has no say in where: what it launches is the same at every position.
        """
        if self.at is None:
            device = self._rooms[0].device
            self.at = torch.tensor(self.lengths, dtype=torch.int32).to(device)

    def reserve(self, T: int) -> None:
        """Have room for T more positions in every row.

        Raises:
            ValueError: they are more than length, or more than a rolling room takes at once.
        """
        need = self.length + T
        if need > self.limit:
            raise ValueError(
                f"KVCache: room is for {self.limit} positions a row;"
                f" got {T} more after {self.length}"
            )
        if self.rolls:
            if self.length and T > SPARE:
                raise ValueError(
                    f"KVCache: a rolling room takes {SPARE} more positions at once; got {T}"
                )
        else:
            self.grow(need)

    def grow(self, need: int) -> None:
        """Have room for so many positions a row, by doubling, where the room is not rolling."""
        slots = self.slots
        if need <= slots or self.rolls:
            return
        while slots < need:
            slots *= 2
        self._remake(torch.arange(self.batch_size), min(slots, self.limit))

    def _remake(self, rows: Tensor, slots: int) -> None:
        """Other rooms, with the rows given."""
        held = min(self.length, self.slots)
        for layer, room in enumerate(self._rooms):
            made = room.new_zeros((2, len(rows), slots, *room.shape[3:]))
            made[:, :, :held] = room[:, rows.to(room.device), :held]
            self._rooms[layer] = made

    def begin(self, T: int, kernels: bool = False) -> tuple[int, Tensor | None]:
        """T more positions of every row are about to come: make room, and say where they stand.

        Args:
            T: how many.
            kernels: whether kernels run on the device.

        Returns:
            The first position, the same in every row, and None; or 0 and all of them, (B, T).
        """
        self.reserve(T)
        self._start, self._places = self.length, None
        wraps = self.rolls and self.length + T > self.slots
        if not self.length:
            self._way = "fresh"
        elif kernels and self.at is not None and T <= FEW:
            self._way = "device"
            at = self.at[:, None]
            more = torch.arange(T, device=at.device, dtype=at.dtype) if T > 1 else None
            self._places = at if more is None else at + more
        elif self._lengths is None and not wraps:
            self._way = "views"
        else:
            self._way = "hidden"
            self._hide(T)
        return (0 if self._places is not None else self._start), self._places

    def _hide(self, T: int) -> None:
        """What T new queries of each row see: (B, 1, T, slots) bool."""
        device, n = self._rooms[0].device, min(self.length + T, self.slots)
        lengths = torch.tensor(self.lengths, device=device)[:, None]  # (B, 1)
        self._places = lengths + torch.arange(T, device=device)  # (B, T)
        # The newest position that a slot may hold: of those later than the last, one round before.
        last = lengths + T - 1
        held = last - (last - torch.arange(n, device=device)) % self.slots  # (B, n)
        i, j = self._places[:, :, None], held[:, None]
        seen = (j >= 0) & (j <= i)
        if self.window is not None:
            seen &= j > i - self.window
        self.seen = seen[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Add keys and values to a layer, and attend to what is then held.

        Args:
            layer: which.
            q: (B, T, H, D), the queries of the T positions that `begin` was told of.
            k, v: (B, T, Hkv, D), theirs.
            dropout_p: see `ops.attention`.

        Returns:
            (B, T, H, D).

        Raises:
            ValueError: there are other rows than the room has.
        """
        keys, values = self._rooms[layer].unbind(0)  # (B, slots, Hkv, D)
        if k.shape[0] != keys.shape[0]:
            raise ValueError(f"KVCache: room is for {keys.shape[0]} rows; got {k.shape[0]}")
        T, start, window = k.shape[1], self._start, self.window
        if self._way == "device":
            assert self.at is not None
            if self.rolls:
                keys, values = (t.view(-1, PAGE, *t.shape[2:]) for t in (keys, values))
            return ops.attention_decode(
                q, keys, values, self.at, k, v, window=window, block_table=self._pages()
            )
        if self._way == "hidden":
            assert self._places is not None
            rows, at = torch.arange(len(k), device=k.device)[:, None], self._places % self.slots
            keys[rows, at], values[rows, at] = k.to(keys.dtype), v.to(keys.dtype)
            n = min(self.length + T, self.slots)
            o = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys[:, :n].to(k.dtype).transpose(1, 2),
                values[:, :n].to(k.dtype).transpose(1, 2), attn_mask=self.seen,
                dropout_p=dropout_p, enable_gqa=q.shape[2] != k.shape[2],
            )  # fmt: skip
            return o.transpose(1, 2)
        if T > self.slots:  # fresh, and the room is a rolling one
            at = torch.arange(T - self.slots, T, device=k.device) % self.slots
            keys[:, at] = k[:, -self.slots :].to(keys.dtype)
            values[:, at] = v[:, -self.slots :].to(keys.dtype)
        else:
            keys[:, start : start + T], values[:, start : start + T] = k, v
        if self._way == "fresh":
            return ops.attention(q, k, v, dropout_p=dropout_p, window=window)
        first = 0 if window is None else max(0, start + 1 - window)
        keys, values = (t[:, first : start + T].to(k.dtype) for t in (keys, values))
        return ops.attention(q, keys, values, dropout_p=dropout_p, window=window)

    def _pages(self) -> Tensor | None:
        """(B, n) int32: which page holds a row's positions, PAGE by PAGE, if the room rolls."""
        if self.rolls and self._table is None:
            assert self.at is not None
            each = self.slots // PAGE
            turns = torch.arange(-(-self.limit // PAGE)) % each
            table = torch.arange(self.batch_size)[:, None] * each + turns
            self._table = table.to(self.at.device, torch.int32)
        return self._table

    def advance(self, T: int, device: bool = True) -> None:
        """The T positions have come, in every layer.

        Args:
            device: whether `at` is to follow; if not, something else moved it.
        """
        self.length += T
        if self._lengths is not None:
            self._lengths = [n + T for n in self._lengths]
        if self.rolls:
            self._tops = [max(t, n) for t, n in zip(self._tops, self.lengths, strict=True)]
        if self.at is not None and device:
            self.at += T

    def truncate(self, lengths: Sequence[int]) -> None:
        """Go back to fewer positions.

        Args:
            lengths: of each row, at most what it holds. In a rolling room, 0 or so many that what
                the next position's window shows was not overwritten: SPARE fewer are always held.

        Raises:
            ValueError: lengths outside these rules.
        """
        held = self.lengths
        if len(lengths) != len(held):
            raise ValueError(f"KVCache: truncate needs {len(held)} lengths; got {len(lengths)}")
        for n, most, top in zip(lengths, held, self._tops, strict=True):
            if not 0 <= n <= most:
                raise ValueError(
                    f"KVCache: a row can be truncated to what it holds, {most}; got {n}"
                )
            # What lies one round behind the newest that was written is lost.
            least = top - self.slots + (self.window or 0) if top > self.slots else 0
            if 0 < n < least:
                raise ValueError(
                    "KVCache: a row that rolls can be truncated to 0 or no further than its window"
                    f" is held, {least} to {most}; got {n}"
                )
        self.hold(lengths)

    def hold(self, lengths: Sequence[int]) -> None:
        """Let rows hold so many positions, which they do."""
        self.length = max(lengths)
        self._lengths = None if min(lengths) == self.length else list(lengths)
        self._tops = [top if n else 0 for top, n in zip(self._tops, lengths, strict=True)]
        if self.at is not None:
            self.at.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)

    def reorder(self, rows: Tensor) -> None:
        """Let row b be what row rows[b] was; rows: (B',) int64, of which there may be others."""
        n, held = self.lengths, min(self.length, self.slots)
        if len(rows) != self.batch_size:
            self._remake(rows, self.slots)
            self._table = None
            if self.at is not None:
                self.at = self.at[rows.to(self.at.device)]
        else:
            for room in self._rooms:
                room[:, :, :held] = room[:, rows.to(room.device), :held]
        self._tops = [self._tops[row] for row in rows.tolist()]
        self.hold([n[row] for row in rows.tolist()])

    def row(self, b: int) -> "KVCache":
        """Row b by itself, in the same memory; `put` tells what it then holds."""
        one = copy.copy(self)
        one._rooms = [room[:, b : b + 1] for room in self._rooms]
        one.length, one._lengths = self.lengths[b], None
        one.at = None if self.at is None else self.at[b : b + 1]
        one._tops, one._table = [self._tops[b]], None
        return one

    def put(self, b: int, row: "KVCache") -> None:
        """Row b holds what the one that `row` gave holds."""
        lengths = self.lengths
        lengths[b], self._tops[b] = row.length, row._tops[0]
        self.hold(lengths)
