"""What a computation costs, counted exactly: the same on every machine, and on the meta device without its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

aten = torch.ops.aten
MATH = "_scaled_dot_product_attention_math"  # products and a softmax written out: what no call should fall to
FLOPS = {**flop_registry, aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
}  # the host waits for the device
COPIES = {"_to_copy": 0, "copy_": 1}  # which argument is read
NOTHING = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_local_scalar_dense",
}  # no kernel


class Counting(TorchDispatchMode):
    """Counts all that runs inside, decomposed to what a kernel runs for.

    On the meta device torch would write every attention out; there the CPU's choice of its fused kernel stands for it. Copies from a
    device to host memory wait too; where all tensors lie in host memory they cannot be told from others, and are not counted.
    """

    def __init__(self, unet: nn.Module | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.flops, self.unet_calls = 0, 0
        self.ops: Counter[str] = Counter()  # without views
        self.places: Counter[str] = Counter()  # the same ops by device
        self.attention: Counter[str] = Counter()  # calls by the kernel they hit
        self.syncs: Counter[str] = Counter()  # what makes the host wait for the device
        self.waits: Counter[str] = Counter()  # of these, those that read no host memory
        self.largest = 0  # bytes of one allocation
        self.shapes: set[tuple[int, ...]] = set()  # of all that was made

    def __enter__(self) -> Self:
        self.hook = self.unet and self.unet.register_forward_pre_hook(self._called)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        if self.hook:
            self.hook.remove()
        super().__exit__(*error)

    def _called(self, *_: object) -> None:
        self.unet_calls += 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if (
            func is aten.scaled_dot_product_attention.default
            and args[0].is_meta
            and fusible(*args, **kwargs)
        ):
            func, name = (
                aten._scaled_dot_product_flash_attention_for_cpu.default,
                "_scaled_dot_product_flash_attention_for_cpu",
            )
            return self._count(
                func,
                name,
                args[:3],
                {"attn_mask": mask_of(args, kwargs), "scale": kwargs.get("scale")},
            )[0]
        if name == MATH:
            self.attention[MATH] += 1
        if func.overloadpacket not in FLOPS and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with Inside(self):
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self._count(func, name, args, kwargs)

    def _waited(self, name: str, read: Tensor) -> None:
        self.syncs[name] += 1
        if read.device.type != "cpu":
            self.waits[name] += 1

    def _count(self, func: Any, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        if (
            name in READS
            or name in ("index", "index_put", "index_put_")
            and any(picks(i) for i in args[1])
        ):
            self._waited(name, args[0])
        out = run(func, args, kwargs)
        if name in COPIES and comes_home(args[COPIES[name]], out):
            self._waited(name, args[COPIES[name]])
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        if func.is_view:
            return out
        if name not in NOTHING:
            self.ops[name] += 1
            self.places["meta" if on_paper(out) else "cpu"] += 1
        if "_scaled_dot_product" in name:
            self.attention[name] += 1
        if not any(r.alias_info for r in func._schema.returns):  # else nothing new is made
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
                    self.shapes.add(tuple(tensor.shape))
        return out


class Inside:
    """A mode is off while it handles an op; this is it once more, without its beginning and end."""

    def __init__(self, mode: Counting) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        TorchDispatchMode.__enter__(self.mode)

    def __exit__(self, *error: object) -> None:
        TorchDispatchMode.__exit__(self.mode, *error)


known: dict[
    Any, tuple[type | None, Any]
] = {}  # what an op makes of such shapes on the meta device, where finding it out is the time


def run(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """func(*args, **kwargs); on the meta device an op that was seen with such shapes is not asked again."""
    if func.is_view or not on_paper(args) or any(a.alias_info for a in func._schema.arguments):
        return func(*args, **kwargs)
    key = func, without_values(args), without_values(kwargs)
    if key not in known:
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) and not all(isinstance(t, Tensor) or t is None for t in out):
            return out
        known[key] = None if isinstance(out, Tensor) else type(out), without_values(out)
        return out
    kind, shapes = known[key]
    tensors = [
        t and torch.empty_strided(t[0], t[1], dtype=t[2], device="meta")
        for t in ((shapes,) if kind is None else shapes)
    ]
    return tensors[0] if kind is None else kind(tensors)


def on_paper(x: Any) -> bool:
    """Whether a tensor on the meta device is among arguments or results."""
    return (
        x.is_meta
        if isinstance(x, Tensor)
        else isinstance(x, (tuple, list)) and any(map(on_paper, x))
    )


def without_values(x: Any) -> Any:
    """What is known of arguments without their contents."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype
    if isinstance(x, Mapping):
        return tuple((name, without_values(value)) for name, value in x.items())
    return tuple(map(without_values, x)) if isinstance(x, (tuple, list)) else x


def comes_home(read: Tensor, answer: Tensor) -> bool:
    """Whether a copy goes from a device to host memory."""
    return read.device.type not in ("cpu", "meta") and answer.device.type == "cpu"


def picks(index: Tensor | None) -> bool:
    """Whether an index is a mask, whose length has to be read."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def mask_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    return args[3] if len(args) > 3 else kwargs.get("attn_mask")


def fusible(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> bool:
    """What the CPU's fused attention takes: no mask or one of 2 or 4 axes, and values as wide as the queries."""
    mask = mask_of((q, k, v, *args), kwargs)
    return q.shape[-1] == v.shape[-1] and (mask is None or mask.ndim in (2, 4))
