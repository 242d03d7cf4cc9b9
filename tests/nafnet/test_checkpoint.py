"""Files in the published format and files that are not: each is loaded exactly, or refused with one clear error."""

import json
import os
import pickle
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch

from nafnet.checkpoint import CheckpointError, clean_state_dict, infer_config, load, save
from nafnet.model import NetConfig, Network
from tests.nafnet import reference

GOPRO = NetConfig(width=8, enc_blocks=(1, 1, 1, 4), middle_blocks=1, dec_blocks=(1, 1, 1, 1))
SIDD = NetConfig(width=8, enc_blocks=(2, 2, 1, 3), middle_blocks=2, dec_blocks=(2, 1, 2, 2))
BASELINE = {"activation": "gelu", "attention": "ca"}
CONFIGS = {
    "NAFNet GoPro": GOPRO,
    "NAFNet SIDD": SIDD,
    "Baseline GoPro": replace(GOPRO, **BASELINE, dw_expand=1),
    "Baseline GoPro wide": replace(GOPRO, **BASELINE, dw_expand=2),
    "Baseline SIDD": replace(SIDD, **BASELINE, dw_expand=1),
    "Baseline SIDD wide": replace(SIDD, **BASELINE, dw_expand=2),
    "PlainNet": replace(GOPRO, norm="none", activation="relu", attention="none", dw_expand=1),
    "odd one": NetConfig(
        width=6, enc_blocks=(0, 2), middle_blocks=0, dec_blocks=(1, 0), image_channels=1, ffn_expand=3
    ),
}
SMALL = NetConfig(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))
WRAPPERS = {
    "bare": lambda state: state,
    "params": lambda state: {"params": state},
    "params_ema beside params": lambda state: {"params": {"intro.weight": torch.ones(1)}, "params_ema": state},
    "state_dict, module.": lambda state: {"state_dict": prefixed("module.", state), "epoch": 3},
    "state_dict, generator.": lambda state: {"state_dict": prefixed("generator.", state), "meta": {"seed": 1}},
    "generator in state_dict, two prefixes": lambda state: {
        "state_dict": {"generator": prefixed("module.", prefixed("generator.", state))}
    },
}


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def network_of(config=SMALL, seed=0):
    return reference.randomize(Network(config), seed)


def written(path, content, **options):
    torch.save(content, path, **options)
    return path


@torch.no_grad()
def assert_same_network(loaded, network):
    image = torch.rand(1, network.config.image_channels, 21, 34)
    assert loaded.config == network.config
    assert not loaded.training
    assert torch.equal(loaded(image), network(image))


def refusal(path, **options):
    """What `load` says; any other error than a CheckpointError fails the test, and so does a message without a name."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert "weights_only" not in str(caught.value)  # torch's own advice is to run the file's code
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What loads


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_file_loads_as_the_network_it_was(name, tmp_path):
    network = network_of(CONFIGS[name])
    loaded = load(written(tmp_path / "net.pth", {"params": network.state_dict()}))
    assert_same_network(loaded.network, network)
    assert loaded.metadata == {}
    assert loaded.train_size is None
    assert infer_config(network.state_dict()) == network.config


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_of_other_trainers(wrapper, tmp_path):
    network = network_of()
    path = written(tmp_path / "net.pth", WRAPPERS[wrapper](network.state_dict()))
    assert_same_network(load(path).network, network)


def test_old_torch_files_and_half_precision(tmp_path):
    network = network_of()
    legacy = written(tmp_path / "old.pth", {"params": network.state_dict()}, _use_new_zipfile_serialization=False)
    assert_same_network(load(legacy).network, network)
    half = written(tmp_path / "half.pth", {name: tensor.half() for name, tensor in network.state_dict().items()})
    loaded = load(half).network.state_dict()
    assert all(torch.equal(loaded[name], tensor.half().float()) for name, tensor in network.state_dict().items())


def test_the_checksum_is_that_of_the_file(tmp_path):
    path = written(tmp_path / "net.pth", {"params": network_of().state_dict()})
    sha256 = load(path).sha256
    assert len(sha256) == 64
    assert load(path, expected_sha256=sha256).sha256 == sha256


@pytest.mark.parametrize("sigma", ["identity", "relu", "gelu", "sigmoid", "silu"])
def test_safetensors_keep_what_the_shapes_do_not_tell(sigma, tmp_path):
    network = network_of(replace(SMALL, sigma=sigma))
    path = tmp_path / "net.safetensors"
    save(path, network, {"train_size": "96", "data": "procedural scenes"})
    loaded = load(path)
    assert_same_network(loaded.network, network)
    assert loaded.train_size == 96
    assert dict(loaded.metadata) == {
        "train_size": "96",
        "data": "procedural scenes",
        "config": json.dumps(asdict(network.config)),
    }
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("name", CONFIGS)
def test_safetensors_of_every_family(name, tmp_path):
    network = network_of(CONFIGS[name])
    save(tmp_path / "net.safetensors", network, {})
    assert_same_network(load(tmp_path / "net.safetensors").network, network)
    trained = network_of(CONFIGS[name]).to(memory_format=torch.channels_last)
    save(tmp_path / "trained.safetensors", trained, {})
    assert (tmp_path / "trained.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_safetensors_without_our_header(tmp_path):
    network = network_of()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    assert_same_network(loaded.network, network)
    assert loaded.train_size is None


def test_an_activation_that_no_shape_shows_comes_from_the_header(tmp_path):
    network = network_of(replace(SMALL, activation="relu", attention="ca"))
    assert infer_config(network.state_dict()).activation == "gelu"
    save(tmp_path / "net.safetensors", network, {})
    assert_same_network(load(tmp_path / "net.safetensors").network, network)


# What is refused


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old torch"])
def test_a_truncated_pth_is_refused_wherever_it_ends(zipped, tmp_path):
    whole = written(
        tmp_path / "whole.pth", {"params": network_of().state_dict()}, _use_new_zipfile_serialization=zipped
    ).read_bytes()
    path = tmp_path / "cut.pth"
    cuts = [0, 1, 2, 3, 4, 10, 30, 64, 100, 1000, *(len(whole) * i // 8 for i in range(1, 8)), len(whole) - 22]
    for cut in [*cuts, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert f"not a whole PyTorch file ({cut} bytes" in refusal(path)


def test_truncated_safetensors_are_refused_wherever_they_end(tmp_path):
    path = tmp_path / "net.safetensors"
    save(path, network_of(), {"train_size": "96"})
    whole = path.read_bytes()
    for cut in [0, 1, 7, 8, 9, 200, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert "not a whole safetensors file" in refusal(path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello\n" * 100,
        "<!DOCTYPE html><html>Sign in</html>",
        "version https://git-lfs.github.com/spec/v1\nsize 3\n",
    ],
    ids=["empty", "text", "web page", "pointer"],
)
def test_files_that_are_no_checkpoints(text, suffix, tmp_path):
    path = tmp_path / f"net.{suffix}"
    path.write_text(text)
    assert "not a whole" in refusal(path)


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load(tmp_path / "nothing.pth")


class Bomb:
    """Pickles to a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "old torch", "plain pickle", "text pickle"])
def test_code_in_a_pickle_is_named_and_never_run(form, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "net.pth"
    content = {"params": network_of().state_dict(), "extra": Bomb(marker)}
    if form in {"zip", "old torch"}:
        written(path, content, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(Bomb(marker), protocol=2 if form == "plain pickle" else 0))
    assert b"touch" in path.read_bytes()
    message = refusal(path)
    assert "refused: it is not plain tensors, opening it would run" in message
    assert f"{os.system.__module__}.system" in message
    assert not marker.exists()


def test_a_pickled_module_is_refused(tmp_path):
    path = written(tmp_path / "net.pth", network_of())
    assert "would run nafnet.model.Network" in refusal(path)


def test_a_wrong_checksum(tmp_path):
    path = written(tmp_path / "net.pth", {"params": network_of().state_dict()})
    message = refusal(path, expected_sha256="0" * 64)
    assert "0" * 64 in message
    assert load(path).sha256 in message


def damage(change):
    """The state of a good network, changed."""
    state = dict(network_of().state_dict())
    change(state)
    return state


BAD_TENSORS = {
    "missing": (lambda s: s.pop("middle_blks.0.norm2.bias"), "missing middle_blks.0.norm2.bias"),
    "extra": (lambda s: s.update(fc=torch.ones(2)), "unexpected fc"),
    "shape": (
        lambda s: s.update({"ups.0.0.weight": torch.ones(32, 15, 1, 1)}),
        "ups.0.0.weight is (32, 15, 1, 1), expected (32, 16, 1, 1)",
    ),
    "NaN": (lambda s: s["decoders.0.0.beta"].view(-1)[3].fill_(float("nan")), "decoders.0.0.beta holds non-finite"),
    "infinite": (lambda s: s["intro.bias"][0].fill_(float("inf")), "intro.bias holds non-finite"),
    "integers": (lambda s: s.update({"intro.bias": torch.ones(8, dtype=torch.int8)}), "intro.bias is torch.int8"),
    "sparse": (lambda s: s.update({"ending.weight": s["ending.weight"].to_sparse()}), "ending.weight is torch.float32"),
    "no levels": (lambda s: [s.pop(f"downs.0.{kind}") for kind in ("weight", "bias")], "fit no network of this family"),
    "no channels": (lambda s: s.update({"intro.weight": torch.ones(0, 3, 3, 3)}), "intro.weight"),
    "no growth": (
        lambda s: s.update({"encoders.0.0.conv1.weight": torch.ones(4, 8, 1, 1)}),
        "dw_expand and ffn_expand must be at least 1",
    ),
    "scalar": (lambda s: s.update({"ending.weight": torch.tensor(3.0)}), "looked for kernels ending.weight"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case, tmp_path):
    change, words = BAD_TENSORS[case]
    assert words in refusal(written(tmp_path / "net.pth", {"params": damage(change)}))


def test_all_problems_come_in_one_error(tmp_path):
    def change(state):
        state.pop("intro.bias")
        state["stranger"] = torch.ones(1)
        state["ending.bias"] = torch.ones(4)
        state["downs.0.bias"][0] = float("nan")

    message = refusal(written(tmp_path / "net.pth", damage(change)))
    for words in ("missing intro.bias", "unexpected stranger", "ending.bias is (4,)", "downs.0.bias holds non-finite"):
        assert words in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: torch.nn.TransformerEncoderLayer(8, 2).state_dict(), "found self_attn.in_proj_weight"),
        (lambda: {"params": {"conv_first.weight": torch.ones(4, 3, 3, 3)}}, "looked for kernels intro.weight"),
        (lambda: [torch.ones(3)], "expected a dictionary of tensors, found list"),
        (lambda: torch.ones(3), "expected a dictionary of tensors, found Tensor"),
        (lambda: {"params": {}}, "no tensors inside"),
        (lambda: {"epoch": 3, "lr": 0.1}, "no tensors inside; its keys are epoch, lr"),
    ],
    ids=["transformer", "other network", "list", "tensor", "nothing", "numbers"],
)
def test_other_content_is_named(content, words, tmp_path):
    assert words in refusal(written(tmp_path / "net.pth", content()))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({**asdict(SMALL), "width": 16}, "its header says NetConfig(width=16"),
        ({**asdict(SMALL), "activation": "swish"}, "activation must be one of gate, gelu, relu, got 'swish'"),
        ({**asdict(SMALL), "activation": "gelu"}, "conv3.weight is"),
        ({**asdict(SMALL), "depth": 3}, "unexpected keyword argument 'depth'"),
        ({**asdict(SMALL), "enc_blocks": 3}, "config is not valid"),
        ([1, 2], "config is not valid"),
        (None, "config is not valid"),
    ],
)
def test_a_header_that_does_not_fit_its_tensors(told, words, tmp_path):
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(network_of().state_dict(), path, metadata={"config": json.dumps(told)})
    assert words in refusal(path)


def test_safetensors_of_unknown_numbers(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "net.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert "F4" in refusal(path)


def test_state_dicts_in_memory():
    network = network_of()
    state = clean_state_dict({"params": prefixed("module.", network.state_dict())}, source="memory")
    assert list(state) == list(network.state_dict())
    with pytest.raises(CheckpointError, match="memory: expected a dictionary of tensors, found int"):
        clean_state_dict(3, source="memory")
    with pytest.raises(CheckpointError, match="state dict: not a NAFNet, Baseline or PlainNet"):
        infer_config({"weight": torch.ones(3)})


@pytest.mark.parametrize("value", ["", "wide", "-3", "9.5"])
def test_a_train_size_that_is_no_number_is_unknown(value, tmp_path):
    save(tmp_path / "net.safetensors", network_of(), {"train_size": value})
    assert load(tmp_path / "net.safetensors").train_size is None
