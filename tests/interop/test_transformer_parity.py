"""DiT against Diffusers' `DiTTransformer2DModel`, live, and a transcription of the authors'.

Every parameter is random, those that start at zero too.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.interop import load_dit, load_transformer, save_transformer
from diffusion.models.positions import sincos_positions
from diffusion.models.transformer import Transformer

with warnings.catch_warnings():
    # On import torch and diffusers warn of their own deprecations.
    warnings.simplefilter("ignore")
    import torch
    from diffusers import DiTTransformer2DModel

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}


def reference(**changes):
    """A random model of Diffusers whose blocks share one embedder, as published ones do."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**CONFIG, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn_like(p))
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model


def inputs(side=8):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    return x, np.array([3, 977]), np.array([4, 5])


def norm_of(difference, of):
    return np.linalg.norm(difference) / np.linalg.norm(of)


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_eps": 1e-6, "patch_size": 4}, {"activation_fn": "gelu", "out_channels": None}],
    ids=["default", "patch_4", "exact_gelu"],
)
def test_outputs_and_gradients_are_diffusers(tmp_path, changes):
    model = reference(**changes)
    model.save_pretrained(tmp_path / "dit")
    module, params = load_transformer(tmp_path / "dit")
    x, t, labels = inputs()
    theirs_x = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    theirs = model(theirs_x, torch.tensor(t), torch.tensor(labels)).sample
    weight = np.random.default_rng(2).normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.tensor(weight)).sum().backward()

    def loss(x):
        out = module.apply({"params": params}, x, jnp.asarray(t), labels=jnp.asarray(labels))
        return (out * weight.transpose(0, 2, 3, 1)).sum(), out

    with jax.default_matmul_precision("highest"):
        grad, ours = jax.grad(loss, has_aux=True)(jnp.asarray(x))
    theirs = theirs.detach().permute(0, 2, 3, 1).numpy()
    assert norm_of(ours - theirs, theirs) < 1e-5
    assert norm_of(grad - theirs_x.grad.permute(0, 2, 3, 1).numpy(), grad) < 1e-4


def test_a_saved_directory_is_diffusers_model(tmp_path):
    model = reference()
    model.save_pretrained(tmp_path / "dit")
    module, params = load_transformer(tmp_path / "dit")
    save_transformer(tmp_path / "again", module, params)
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    reloaded, same = load_transformer(tmp_path / "again")
    assert reloaded == module
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))


def test_embedders_that_differ_between_blocks_are_refused(tmp_path):
    model = reference()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[0] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\.norm1.*linear_1\.bias differs"):
        load_transformer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_bias", False), ("norm_type", "ada_norm"), ("caption_channels", 8)],
)
def test_keys_without_an_equal_are_refused_by_name(tmp_path, key, value):
    reference().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=key):
        load_transformer(tmp_path)


def test_what_diffusers_lacks_is_not_written(tmp_path):
    module = Transformer(positions="rotary", num_classes=3, size=8, freq_shift=1)
    with pytest.raises(ValueError, match="positions='rotary'"):
        save_transformer(tmp_path / "out", module, {})
    assert not (tmp_path / "out").exists()


class OwnBlock(torch.nn.Module):
    """DiT's block in the tests' own words (models.py, class DiTBlock)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = torch.nn.ModuleDict(
            {"qkv": torch.nn.Linear(width, 3 * width), "proj": torch.nn.Linear(width, width)}
        )
        self.mlp = torch.nn.ModuleDict(
            {"fc1": torch.nn.Linear(width, 4 * width), "fc2": torch.nn.Linear(4 * width, width)}
        )
        self.adaLN_modulation = torch.nn.Sequential(
            torch.nn.SiLU(), torch.nn.Linear(width, 6 * width)
        )

    def forward(self, u, c):
        b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        h = plain_norm(u) * (1 + s1) + b1
        n, tokens, width = h.shape
        qkv = self.attn["qkv"](h).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
        u = u + g1 * self.attn["proj"](h.transpose(1, 2).reshape(n, tokens, width))
        h = self.mlp["fc1"](plain_norm(u) * (1 + s2) + b2)
        return u + g2 * self.mlp["fc2"](torch.nn.functional.gelu(h, approximate="tanh"))


def plain_norm(u):
    return torch.nn.functional.layer_norm(u, u.shape[-1:], eps=1e-6)


class Own(torch.nn.Module):
    """DiT-S of two blocks, patches of 2, on 4 x 8 x 8; six classes and the null one."""

    def __init__(self, width=384, heads=6):
        super().__init__()
        self.x_embedder = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(4, width, 2, 2)})
        mlp = (torch.nn.Linear(256, width), torch.nn.SiLU(), torch.nn.Linear(width, width))
        self.t_embedder = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(*mlp)})
        table = torch.nn.Embedding(7, width)
        self.y_embedder = torch.nn.ModuleDict({"embedding_table": table})
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 16, width), requires_grad=False)
        self.blocks = torch.nn.ModuleList(OwnBlock(width, heads) for _ in range(2))
        final = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, 2 * width))
        out = torch.nn.Linear(width, 32)
        self.final_layer = torch.nn.ModuleDict({"adaLN_modulation": final, "linear": out})

    def forward(self, x, t, y):
        u = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        w = torch.exp(-np.log(10000.0) * torch.arange(128) / 128)
        angle = t[:, None].float() * w
        c = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], -1))
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            u = block(u, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        u = self.final_layer["linear"](plain_norm(u) * (1 + scale) + shift)
        u = u.reshape(len(x), 4, 4, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", u).reshape(len(x), 8, 8, 8)


def own():
    torch.manual_seed(3)
    model = Own()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.05 * torch.randn_like(p))
        places = [np.arange(4.0)] * 2
        model.pos_embed.copy_(torch.tensor(sincos_positions(places, 384))[None])
    return model


@pytest.mark.parametrize("entry", [None, "ema", "model"])
def test_the_authors_files_are_read(tmp_path, entry):
    model = own()
    state = model.state_dict()
    torch.save(state if entry is None else {entry: state, "opt": {}}, tmp_path / "dit.pt")
    module, params = load_dit(tmp_path / "dit.pt")
    assert (module.depth, module.heads, module.patch, module.size) == (2, 6, 2, 8)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    t, labels = np.array([3, 977]), np.array([4, 6])
    with torch.no_grad():
        theirs = model(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(labels))
    with jax.default_matmul_precision("highest"):
        x, t, labels = map(jnp.asarray, (x, t, labels))
        ours = module.apply({"params": params}, x, t, labels=labels)
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert norm_of(ours - theirs, theirs) < 1e-5


def test_positions_of_another_kind_are_refused(tmp_path):
    state = own().state_dict()
    state["pos_embed"] = state["pos_embed"].flip(1)
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="pos_embed is not that of 4 x 4 patches"):
        load_dit(tmp_path / "dit.pt")


def test_another_files_weights_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no checkpoint of DiT"):
        load_dit(tmp_path / "other.pt")
