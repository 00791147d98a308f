"""A CUDA device that is not there: tensors lie in host memory, say that they are on cuda:0, and refuse to mix with others.

What it shows without a GPU: tensors left on the CPU, waits of the host (item, bool, nonzero, a blocking copy), every copy up and down with
the line that made it, and what is read before its copy has arrived: until somebody waits for it, that is NaN. What it cannot show: kernels,
speed, memory. A copy down blocks unless it is non_blocking into pinned memory; one up unless it is non_blocking.
Nothing here is torch's public API; it holds for torch 2.11.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from callers import line
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOM = 60 << 30  # bytes that are free on the device
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
}
PICKING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # by a mask they read its length
FILLING = {"fill_", "masked_fill", "masked_fill_", "index_put_", "index_put"}  # with a number
FUSED = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}
WHOLE = {"scaled_dot_product_attention"}  # computed as the CPU would, to compare with it
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Act:
    """One wait, or one copy between host memory and the device.

    kind: "wait", "up", "down"; blocks: whether the host waits until all that was asked of the device is done; where: the innermost line
    of the pack or the host, pack: the innermost of the pack; step: the pass of a sampler and the question that it came behind, None
    outside.
    """

    kind: str
    name: str
    blocks: bool
    pinned: bool
    where: str
    pack: str
    step: tuple[int, int] | None
    bytes: int = 0

    def __str__(self) -> str:
        how = "" if self.kind == "wait" else " blocking" if self.blocks else " asynchronous"
        within = f" for {self.pack}" if self.pack and self.pack != self.where else ""
        return f"{self.kind}{how}: {self.name} at {self.where}{within}"


class DeviceMix(RuntimeError):
    """Tensors of two devices in one operation."""


class OnDevice(Tensor):
    """A CPU tensor, `held`, that says it is on cuda:0."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CUDA,
        )
        made.held = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({list(self.held.shape)}, {self.held.dtype})"

    def tolist(self) -> Any:
        Pretended.now.wait("tolist")
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"numpy() of a tensor on the device, at {line()[0]}")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def record_stream(self, stream: Any) -> None:
        """Its memory is held as long as the stream reads it; here always."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return Pretended.now.run(func, args, kwargs or {})


# streams ----------------------------------------------------------------------------------------------------------------------


class Event:
    """A place in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream, self.place = None, 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Pretended.now.stream
        self.place = self.stream.asked

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Pretended.now.stream).wait_event(self)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.reach(self.place)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.place


class Stream:
    """Copies that nobody waited for yet. Whatever else is asked of a stream is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.copies: list[Callable[[], object]] = []
        self.done = 0

    @property
    def asked(self) -> int:
        return self.done + len(self.copies)

    def put(self, copy: Callable[[], object]) -> None:
        self.copies.append(copy)

    def reach(self, place: int) -> None:
        while self.done < place:
            self.done += 1
            self.copies.pop(0)()

    def synchronize(self) -> None:
        self.reach(self.asked)

    def wait_event(self, event: Event) -> None:
        if self.main or event.stream is self:
            event.synchronize()
        else:
            self.put(event.synchronize)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self.copies

    @property
    def main(self) -> bool:
        return self is Pretended.now.main


class Within:
    """torch.cuda.stream: inside, what is asked is asked of this stream."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before, Pretended.now.stream = Pretended.now.stream, self.stream or Pretended.now.main

    def __exit__(self, *_: object) -> None:
        Pretended.now.stream = self.before


# the device -------------------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Where a sampler is: which pass of it, and which step of that; None between them."""

    at: tuple[int, int] | None = None
    passes: int = 0

    def begin(self) -> None:
        """The sampler asks for its next step."""
        self.at = (self.passes, 0 if self.at is None else self.at[1] + 1)

    def end(self) -> None:
        """The sampler has all its steps."""
        self.at, self.passes = None, self.passes + 1


class Pretended(TorchDispatchMode):
    """Inside, what is made on or moved to "cuda" is an OnDevice; acts: all waits and copies in their order."""

    now: Pretended

    def __init__(self) -> None:
        super().__init__()
        self.acts: list[Act] = []
        self.steps = Steps()
        self.main = self.stream = Stream()
        self.pinned: dict[int, Tensor] = {}  # by the address of their memory
        Pretended.now = self

    def clear(self) -> None:
        self.acts.clear()
        self.steps = Steps()

    def wait(self, name: str) -> None:
        """The host waits for all that was asked of the device."""
        self._note("wait", name, True)
        self.stream.synchronize()

    def _note(
        self, kind: str, name: str, blocks: bool, pinned: bool = False, size: int = 0
    ) -> None:
        where, pack = line()
        self.acts.append(Act(kind, name, blocks, pinned, where, pack, self.steps.at, size))

    # copies

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        """Marks it as pinned."""
        if tensor.untyped_storage().nbytes():
            self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def copied_up(self, name: str, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """`target` holds what `source` does, once its stream comes to it."""
        pinned = self.is_pinned(source)
        self._note("up", name, not non_blocking, pinned, source.nbytes)
        if not non_blocking:
            self.stream.synchronize()
            target.copy_(source)
        elif self.stream is self.main:
            target.copy_(source)
            if pinned:
                self.stream.put(_unchanged(source, line()[0]))
        else:
            held = source if pinned else source.clone()
            _spoil(target)
            self.stream.put(partial(target.copy_, held))

    def copied_down(self, name: str, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        pinned = self.is_pinned(target)
        blocks = not (non_blocking and pinned)
        self._note("down", name, blocks, pinned, source.nbytes)
        if blocks:
            self.stream.synchronize()
            target.copy_(source)
            return
        held = source.clone()
        _spoil(target)
        self.stream.put(partial(target.copy_, held))

    # operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name, composite = known(func)
        if composite:
            with self:
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        if name in ("pin_memory", "_pin_memory"):
            return self.pin(args[0].clone())
        if name == "is_pinned":
            return self.is_pinned(args[0])
        tensors: list[Tensor] = []
        _collect(args, tensors)
        _collect(kwargs, tensors)
        here = [t for t in tensors if isinstance(t, OnDevice)]
        device = kwargs.get("device")
        onto = bool(here) if device is None else torch.device(device).type == "cuda"
        if name == "_to_copy" and onto != bool(here):
            return self._moved(args[0], kwargs, onto)
        if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            return self._written(*args, **kwargs)
        if here:
            self._look_at(func, name, args, here, tensors)
        return self._computed(func, name, args, kwargs, onto, tensors)

    def _moved(self, source: Tensor, kwargs: dict, up: bool) -> Tensor:
        """Tensor.to between host memory and the device."""
        real, non_blocking = _real(source), bool(kwargs.get("non_blocking"))
        if (dtype := kwargs.get("dtype")) is not None:
            real_kept, real = real, real.to(dtype)
            if up and self.is_pinned(real_kept) and real is not real_kept:
                self.pin(real)  # it is converted on the device
        target = torch.empty_like(real, memory_format=torch.preserve_format)
        if up:
            self.copied_up("to", real, target, non_blocking)
            return OnDevice(target)
        if non_blocking:
            self.pin(target)
        self.copied_down("to", real, target, non_blocking)
        return target

    def _written(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Tensor.copy_ between host memory and the device."""
        real = _real(source).to(target.dtype).expand_as(_real(target))
        copied = self.copied_up if isinstance(target, OnDevice) else self.copied_down
        copied("copy_", real, _real(target), bool(non_blocking))
        return target

    def _look_at(self, func: Any, name: str, args: tuple, here: list, tensors: list) -> None:
        """Note what waits, and refuse what mixes; a number that lies in host memory may stand in arithmetic."""
        number = torch.Tag.pointwise in func.tags or name in FILLING
        there = [t for t in tensors if not isinstance(t, OnDevice) and not (number and t.ndim == 0)]
        if name in PICKING and isinstance(args[0], OnDevice):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.wait(f"{name} by a mask")
            for index in (i for i in indices if not isinstance(i, OnDevice)):
                self._note("up", f"{name} by host memory", True, False, index.nbytes)
                self.stream.synchronize()
            there = [t for t in there if not any(t is i for i in indices)]
        if there:
            sides = [(tuple(t.shape), str(t.device)) for t in tensors]
            raise DeviceMix(f"{name} at {line()[1] or line()[0]} mixes devices: {sides}")
        if name in READS and not (name == "repeat_interleave" and len(args) > 1):
            self.wait(name)

    def _computed(
        self, func: Any, name: str, args: tuple, kwargs: dict, onto: bool, tensors: list
    ) -> Any:
        real_args, real_kwargs = _each(_real, args), _each(_real, kwargs)
        pins = real_kwargs.pop("pin_memory", None)
        if real_kwargs.get("device") is not None:
            real_kwargs["device"] = CPU
        if name == "_fused_sdp_choice":
            return 0
        if name in FUSED and tensors[0].device.type == "cuda":
            out = _flash(*real_args[:3])
        else:
            out = func(*real_args, **real_kwargs)
        if pins and not onto and isinstance(out, Tensor):
            self.pin(out)
        # what worked in place gives back its own argument
        back = {id(_real(t)): t for t in tensors}

        def told(x: Any) -> Any:
            if id(x) in back:
                return back[id(x)]
            return OnDevice(x) if onto and isinstance(x, Tensor) else x

        return _each(told, out)


def _real(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


@cache
def known(func: Any) -> tuple[str, bool]:
    """An operation's name, and whether it is made of others."""
    name = func._schema.name.split("::")[1]
    key = "CompositeImplicitAutograd"
    made = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return name, made and name not in WHOLE


def _collect(x: Any, tensors: list[Tensor]) -> None:
    """Every tensor among arguments."""
    if isinstance(x, Tensor):
        tensors.append(x)
    elif isinstance(x, (list, tuple)):
        for one in x:
            _collect(one, tensors)
    elif isinstance(x, dict):
        _collect(list(x.values()), tensors)


def _each(change: Callable[[Any], Any], x: Any) -> Any:
    """Arguments or results with every part changed."""
    if isinstance(x, (list, tuple)):
        return type(x)([_each(change, one) for one in x])
    if isinstance(x, dict):
        return {name: _each(change, one) for name, one in x.items()}
    return change(x)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """CUDA's flash attention by the CPU's; it takes no float32."""
    if q.dtype not in HALVES:
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, sums, *(None,) * 7


def _spoil(target: Tensor) -> None:
    """Nobody may read it yet."""
    if target.is_floating_point():
        target.fill_(torch.nan)
    else:
        target.fill_(target.dtype is torch.bool or torch.iinfo(target.dtype).min)


def _unchanged(source: Tensor, where: str) -> Callable[[], None]:
    """What is asked once the copy is done: nobody wrote into its pinned source before."""
    before = source.clone()

    def check() -> None:
        if not torch.equal(before.nan_to_num(), source.nan_to_num()):
            raise RuntimeError(
                f"what was copied up at {where} was written before its copy was done"
            )

    return check


# torch.cuda -------------------------------------------------------------------------------------------------------------------


class Card:
    """What torch says of it."""

    major, minor, name, total_memory, multi_processor_count = 9, 0, "pretended", 80 << 30, 100


def _says(patch: pytest.MonkeyPatch, free: int) -> None:
    """torch.cuda of a machine that has a device."""
    answers = {
        "_lazy_init": None,
        "is_bf16_supported": True,
        "current_device": 0,
        "device_count": 1,
        "empty_cache": None,
        "get_device_properties": Card,
        "get_device_capability": (9, 0),
        "get_device_name": Card.name,
        "set_device": None,
        "set_rng_state": None,
        "mem_get_info": (free, 80 << 30),
        "memory_stats": Counter(),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "stream", Within)
    patch.setattr(torch.cuda, "current_stream", lambda *_, **__: Pretended.now.stream)
    patch.setattr(torch.cuda, "default_stream", lambda *_, **__: Pretended.now.main)
    patch.setattr(torch.cuda, "synchronize", lambda *_, **__: Pretended.now.wait("synchronize"))


@contextmanager
def pretended(free: int = ROOM) -> Iterator[Pretended]:
    """Inside, torch has a device; afterwards all is as it was. free: bytes that it says are free."""
    torch._C._ensureCUDADeviceGuardSet()  # as torch's own fake tensors do
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor asks for a driver
    try:
        with pytest.MonkeyPatch.context() as patch, Pretended() as device:
            _says(patch, free)
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
