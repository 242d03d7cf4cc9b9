"""Weights on disk: a file becomes a clean state dict, its tensor shapes a `NetConfig`, and both a loaded network.

Reads the authors' `.pth` files, files of other trainers that wrap the same tensors, and this project's safetensors.
Nothing in a file is ever executed.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nafnet.model import Activation, Attention, NetConfig, Network, Norm

_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "generator")
_PREFIXES = ("module.", "generator.", "net_g.", "_orig_mod.")
_SHOWN = 4  # names listed in an error before "and n more"


class CheckpointError(ValueError):
    """A file that is not a network of this family, is damaged, or is not the file it should be."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded file. `metadata` is what a safetensors header says (training recipe), else empty."""

    network: Network  # float32, eval mode, CPU
    sha256: str
    metadata: Mapping[str, str]

    @property
    def train_size(self) -> int | None:
        """The side of the training crops in px when the file tells, which fixes the TLC window."""
        value = self.metadata.get("train_size", "")
        return int(value) if value.isdigit() else None


def load(path: str | Path, *, expected_sha256: str | None = None) -> Checkpoint:
    """Read a checkpoint and build its network.

    Raises:
        CheckpointError: names the file, what was looked for and what was found.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise CheckpointError(
            f"{path}: SHA-256 is {sha256}, expected {expected_sha256}: it is damaged or another file; fetch it again"
        )
    tensors, metadata = _read(path, data)
    state = clean_state_dict(tensors, source=str(path))
    config = infer_config(state, source=str(path))
    if "config" in metadata:
        config = _told_config(config, metadata["config"], path)
    return Checkpoint(_build(config, state, path), sha256, metadata)


def save(path: str | Path, network: Network, metadata: Mapping[str, str]) -> None:
    """Write the network as safetensors, whole or not at all, with its config and `metadata` in the header."""
    path = Path(path)
    header = {"config": json.dumps(asdict(network.config)), **metadata}
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in network.state_dict().items()}
    part = path.with_suffix(path.suffix + ".part")
    safetensors.torch.save_file(state, part, metadata=header)
    part.replace(path)


def clean_state_dict(content: object, *, source: str) -> dict[str, Tensor]:
    """Unwrap what trainers put around the tensors: nesting ("params" and others) and name prefixes.

    Raises:
        CheckpointError: there are no named tensors inside.
    """
    while isinstance(content, dict):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: expected a dictionary of tensors, found {type(content).__name__}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{source}: no tensors inside; its keys are {_some(map(str, content))}")
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def infer_config(state: Mapping[str, Tensor], *, source: str = "state dict") -> NetConfig:
    """Read the network's shape off its tensors.

    Two dials leave no trace in the shapes and are taken as published: the gate's sigma is the identity, and an
    activation that is no gate is GELU where there is a layer norm or attention, else ReLU (PlainNet).

    Raises:
        CheckpointError: the tensors are not those of this family.
    """
    names = ["intro.weight", "ending.weight"]
    block = next((name.removesuffix("conv1.weight") for name in state if name.endswith(".conv1.weight")), None)
    names += [f"{block or 'encoders.0.0.'}conv{i}.weight" for i in range(1, 6)]
    if absent := [name for name in names if name not in state or state[name].ndim != 4 or not state[name].numel()]:
        raise CheckpointError(
            f"{source}: not a NAFNet, Baseline or PlainNet: looked for kernels {_some(absent)}, found {_some(state)}"
        )
    width, image_channels = state["intro.weight"].shape[:2]
    channels = state[f"{block}conv1.weight"].shape[1]
    wide = state[f"{block}conv1.weight"].shape[0]
    gated = state[f"{block}conv3.weight"].shape[1] * 2 == wide
    norm: Norm = "layer" if f"{block}norm1.weight" in state else "none"
    attention: Attention = "none"
    if f"{block}sca.1.weight" in state:
        attention = "sca"
    elif f"{block}se.1.weight" in state:
        attention = "ca"
    plain = norm == "none" and attention == "none"
    activation: Activation = "gate" if gated else ("relu" if plain else "gelu")
    levels = sum(re.fullmatch(r"downs\.\d+\.weight", name) is not None for name in state)
    try:
        return NetConfig(
            width=width,
            enc_blocks=tuple(_count(state, f"encoders.{i}") for i in range(levels)),
            middle_blocks=_count(state, "middle_blks"),
            dec_blocks=tuple(_count(state, f"decoders.{i}") for i in range(levels)),
            image_channels=image_channels,
            dw_expand=wide // channels,
            ffn_expand=state[f"{block}conv4.weight"].shape[0] // channels,
            norm=norm,
            activation=activation,
            attention=attention,
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: its tensor shapes fit no network of this family: {error}") from error


def _count(state: Mapping[str, Tensor], group: str) -> int:
    return sum(re.fullmatch(rf"{re.escape(group)}\.\d+\.conv1\.weight", name) is not None for name in state)


def _read(path: Path, data: bytes) -> tuple[object, dict[str, str]]:
    if data[8:9] == b"{" or path.suffix == ".safetensors":  # an 8-byte length, then a JSON header
        try:
            return safetensors.torch.load(data), _safetensors_metadata(data)
        except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch has not
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {}
    except Exception as error:  # which one torch raises for cut or foreign bytes depends on where they break
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path}: refused: it is not plain tensors, opening it would run {code[1]}. Save its state dict alone, "
                "or convert it to safetensors where it was made"
            ) from error
        reason = f"{type(error).__name__} {error}".splitlines()[0].split(". ")[0]
        raise CheckpointError(
            f"{path}: not a whole PyTorch file ({len(data)} bytes, {reason}); fetch it again"
        ) from error


def _safetensors_metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return {str(key): str(value) for key, value in (header.get("__metadata__") or {}).items()}


def _told_config(inferred: NetConfig, told: str, path: Path) -> NetConfig:
    """The config in the header, which also knows activation and sigma; it must agree with the tensors."""
    try:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(told).items()}
        config = NetConfig(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header's network config is not valid: {error}") from error
    hidden = ("activation", "sigma")
    if {**asdict(config), **dict.fromkeys(hidden)} != {**asdict(inferred), **dict.fromkeys(hidden)}:
        raise CheckpointError(f"{path}: its header says {config}, its tensors say {inferred}")
    return config


def _build(config: NetConfig, state: dict[str, Tensor], path: Path) -> Network:
    with torch.device("meta"):  # no random weights that the file's would replace
        network = Network(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing {_some(missing)}")
    if extra := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected {_some(extra)}")
    for name in sorted(expected.keys() & state.keys()):
        if expected[name] != tuple(state[name].shape):
            problems.append(f"{name} is {tuple(state[name].shape)}, expected {expected[name]}")
        elif not _is_plain(state[name]):
            problems.append(f"{name} is {state[name].dtype}, {state[name].layout}; expected dense floating point")
        elif not torch.isfinite(state[name]).all():
            problems.append(f"{name} holds non-finite numbers")
    if problems:
        raise CheckpointError(f"{path}: does not fit {config}: {'; '.join(problems[:8])}")
    network.load_state_dict({name: state[name].float() for name in expected}, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _some(names: Any) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
