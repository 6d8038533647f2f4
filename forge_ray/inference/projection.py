"""A linear layer that is fast on a CPU and adds each row's own LoRA adapter.

On a CPU a weight is kept in the layout that oneDNN multiplies fastest: for the few rows of a decoding step half of the time
goes into rearranging it otherwise. That layout is of the same numbers, so nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # given the same tensor, where the module has them all
ROWS = 16  # of a typical step: oneDNN chooses the layout for it


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Weight:
    """[out, in], packed where that helps."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.packed = _can_pack(weight)
        if self.packed:
            self.data = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        else:
            self.data = weight.detach()

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.data, bias, "none", [], "")
            return product
        return nn.functional.linear(x, self.data, bias)

    def add(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """`to` + x @ weight.T, rounded once."""
        if self.packed:
            total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, to, self.data, None, "add")
            return total
        flat = torch.addmm(to.flatten(0, -2), x.flatten(0, -2), self.data.T)
        return flat.view_as(to)


@dataclass
class AdapterRows:
    """Which adapter each row of the running step has: [rows] indices, -1 for none; None where no row has one. A forward
    pass of one adapter has a single index for all rows."""

    adapters: torch.Tensor | None = None
    masks: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def mask(self, columns: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """[rows, columns] 1 where the column belongs to the row's adapter; the same for most layers, so made once a step."""
        if columns not in self.masks:
            assert self.adapters is not None
            owners = torch.tensor(columns, device=like.device)
            self.masks[columns] = (self.adapters[:, None] == owners).to(like.dtype)
        return self.masks[columns]


@dataclass(frozen=True)
class Stack:
    """The adapters of one product side by side: `down` [all ranks, in], `up` [out, all ranks] with the scale in it."""

    down: Weight
    up: Weight
    columns: tuple[int, ...]  # the adapter of each rank


class Product:
    """One linear layer, or several that are given the same tensor and are multiplied at once (query, key and value). `stack`
    is set by `adapters.py`."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: AdapterRows) -> None:
        self.names = tuple(linears)
        self.sizes = [linear.out_features for linear in linears.values()]
        self.weight = Weight(torch.cat([linear.weight.detach() for linear in linears.values()]))
        self.bias: torch.Tensor | None = None
        if any(linear.bias is not None for linear in linears.values()):
            self.bias = torch.cat([_bias(linear) for linear in linears.values()])
        self.rows = rows
        self.stack: Stack | None = None
        self._given: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.weight.apply(x, self.bias)
        if self.stack is None or self.rows.adapters is None:
            return out
        inner = self.stack.down.apply(x)
        return self.stack.up.add(inner * self.rows.mask(self.stack.columns, inner), out)

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The output of layer `index` for `x`; the outputs of the others are kept until each was requested."""
        if len(self.names) == 1:
            return self(x)
        if self._given is not x:
            self._given, self._parts = x, self(x).split(self.sizes, dim=-1)
        part = self._parts[index]
        if index == len(self.names) - 1:
            self._given, self._parts = None, ()
        return part


class Projection(nn.Module):
    """Replaces an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, product: Product, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product, self._index = product, index

    @property
    def weight(self) -> torch.Tensor:
        """The weight that models read for its dtype and device."""
        weight: torch.Tensor = self.product.weight.data
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.part(x, self._index)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the model's text decoder by their names in the model; those that PEFT wraps are left out."""
    decoder = model.get_decoder()
    start = next((f"{name}." for name, module in model.named_modules() if module is decoder), "")
    wrapped = tuple(name for name, module in decoder.named_modules() if type(module).__module__.startswith("peft."))
    return {
        start + name: module
        for name, module in decoder.named_modules()
        if type(module) is nn.Linear and not any(name.startswith(f"{outer}.") for outer in wrapped)
    }


def project(model: Any, rows: AdapterRows) -> tuple[Product, ...]:
    """Replace `linear_layers`, and the language model's head, in place. Adapters are for the products that are returned."""
    linears = linear_layers(model)
    groups: dict[tuple[str, int], list[str]] = {}
    for name in linears:
        parent, _, child = name.rpartition(".")
        together = next((group for group in TOGETHER if child in group), (child,))
        groups.setdefault((f"{parent}.{together[0]}", linears[name].in_features), []).append(name)
    products = tuple(Product({name: linears[name] for name in names}, rows) for names in groups.values())
    for product in products:
        for index, name in enumerate(product.names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Projection(linears[name], product, index))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(Projection(head, Product({"": head}, AdapterRows()), 0))
    return products


def _bias(linear: nn.Linear) -> torch.Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
