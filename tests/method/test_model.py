"""Networks and whole training steps have the numbers and names of the released implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from golden_inputs import fill, fill_backbone, fill_noise, noise, sine_images

import model
from checkpoint import load_backbone
from loss import twist_loss
from model import (
    ARCHS,
    BarlowTwins,
    BatchNorm,
    ProjectionHead,
    Twist,
    build_backbone,
    build_network,
    bunch_layout,
    patch_size,
    remove_classifier,
    synchronize_batch_norms,
    zero_init_residual,
)
from optim import LARS, param_groups

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("arch", ["resnet50", pytest.param("resnet50w2", marks=pytest.mark.slow), "vit_t",
                                  "vit_s"])
def test_backbone_computes_the_published_features(arch):
    golden = np.load(GOLDEN / f"backbone_{arch}.npz")
    backbone = build_backbone(arch).eval()
    vit = arch.startswith("vit")
    (fill(backbone.state_dict()) if vit else fill_backbone(backbone))
    with torch.inference_mode():
        if vit:
            last4, expected = backbone.features(sine_images(2, 224), 4).numpy(), golden["last4_cls_224"]
            assert last4.shape == expected.shape
            assert np.abs(last4 - expected).max() < 1e-4 * np.abs(expected).max()
        for size, batch in ((224, 2 if vit else 1), (96, 2)):
            expected = golden[f"features_{size}"]
            features = backbone(sine_images(batch, size)).numpy()
            assert features.shape == (batch, backbone.feature_dim)
            assert np.abs(features - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("arch, feature_dim", [("resnet50", 2048), ("vit_s", 384)])
def test_projection_head_computes_the_published_logits(arch, feature_dim):
    golden = np.load(GOLDEN / f"projection_head_{arch}.npz")
    head = ProjectionHead(feature_dim, hidden_dim=96, num_classes=64, gelu=arch == "vit_s")
    fill(head.state_dict())
    logits = head(torch.from_numpy(golden["features"])).detach().numpy()
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()


@pytest.mark.parametrize("arch", ["resnet50", "vit_s"])
def test_state_dict_has_the_published_names_and_shapes(arch):
    golden = json.loads((GOLDEN / f"model_state_dict_{arch}.json").read_text())
    state = Twist(arch, num_classes=64, hidden_dim=96).state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == golden


@pytest.mark.parametrize("arch", ["vit_t8", "vit_s8", "vit_b8"])
def test_a_vit_with_patches_of_8_has_dinos_names_and_shapes(arch):
    """Those of the published ViT-S/16, but for the width, the patch embedding, and 28 × 28 positions."""
    golden = json.loads((GOLDEN / "model_state_dict_vit_s.json").read_text())
    with torch.device("meta"):
        state, dim = build_backbone(arch).state_dict(), dict(vit_t8=192, vit_s8=384, vit_b8=768)[arch]
    expected = {name.removeprefix("backbone."): [n * dim // 384 if n % 384 == 0 else n for n in shape]
                for name, shape in golden.items() if name.startswith("backbone.")}
    expected |= {"pos_embed": [1, 785, dim], "patch_embed.proj.weight": [dim, 3, 8, 8]}
    assert {name: list(t.shape) for name, t in state.items()} == expected


def test_dinos_patches_of_8_load_and_their_positions_are_interpolated_as_there(tmp_path):
    theirs = build_backbone("vit_t8")
    torch.nn.init.normal_(theirs.pos_embed)
    torch.save({"teacher": {f"module.backbone.{name}": t for name, t in theirs.state_dict().items()}},
               tmp_path / "dino.pth")
    ours = build_backbone("vit_t8").eval()
    load_backbone(ours, tmp_path / "dino.pth")
    assert ours.positions(28, 28) is ours.pos_embed and ours.pos_embed.equal(theirs.pos_embed)
    grid = theirs.pos_embed[:, 1:].view(1, 28, 28, 192).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(4 + 0.1) / 28, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(ours.positions(4, 4)[:, 1:], grid)
    assert ours(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    assert [patch_size(arch) for arch in ("vit_t8", "vit_t", "resnet18")] == [8, 16, 1]


def test_three_training_steps_are_the_published_ones():
    """Backbone, multi-crop forward, head, NBS, loss, gradient, LARS, groups together: in float64 to 1e-8."""
    g = np.load(GOLDEN / "three_steps.npz")
    batch, num_views = int(g["batch"]), int(g["num_views"])
    model = Twist("resnet18", num_classes=64, hidden_dim=96).double()
    fill_noise(model.state_dict())
    views = [torch.from_numpy(noise(batch * 3 * s * s, 1000 + v)).view(batch, 3, s, s)
             for v, s in enumerate([32, 32] + [16] * (num_views - 2))]
    optimizer = LARS(param_groups(model, float(g["weight_decay"])), lr=0.0, momentum=float(g["momentum"]))
    losses = []
    for lr in g["learning_rates"]:
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        loss = twist_loss(model(views), float(g["alpha"]), float(g["beta"]), float(g["eps"])).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, g["losses"], rtol=1e-8)
    params = dict(model.named_parameters())
    assert sorted(params) == sorted(g["names"])
    norms = [params[name].detach().norm() for name in g["names"]]
    np.testing.assert_allclose(norms, g["norms"], rtol=1e-8, atol=1e-10)
    running_mean_norm = model.backbone.bn1.running_mean.norm().item()
    np.testing.assert_allclose(running_mean_norm, g["running_mean_norm"], rtol=1e-8)


@pytest.mark.parametrize("arch", ["resnet8", "resnet8_2x2", "resnet8w2_2x2", "resnet18", "resnet34"])
@pytest.mark.parametrize("small_images", [False, True])
def test_every_backbone_maps_images_to_features(arch, small_images):
    backbone = build_backbone(arch, small_images).eval()
    features = backbone(torch.randn(2, 3, 28, 28))
    assert features.shape == (2, backbone.feature_dim)
    if small_images:
        assert backbone.conv1.stride == (1, 1) and isinstance(backbone.maxpool, torch.nn.Identity)


@pytest.mark.parametrize("arch, parameters", [      # torchvision's counts, less the last linear layer's
    ("mobilenet_v3_large", 5_483_032 - 1_281_000), ("efficientnet_b0", 5_288_548 - 1_281_000),
    ("efficientnet_b1", 7_794_184 - 1_281_000)])
def test_small_networks_of_torchvision(arch, parameters):
    backbone = build_backbone(arch).eval()
    assert backbone.feature_dim == 1280 and backbone(torch.randn(2, 3, 64, 64)).shape == (2, 1280)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    with pytest.raises(ValueError, match=arch):
        build_backbone(arch, small_images=True)


@pytest.mark.parametrize("arch, features", [("wide_resnet50_2", 2048), ("swin_t", 768), ("vit_b_16", 768)])
def test_an_arch_of_torchvision_is_torchvisions(arch, features, monkeypatch):
    """Also if its name has a part of one of ours."""
    monkeypatch.setattr(model, "ARCHS", (*model.ARCHS, arch, "vit_s14"))
    with torch.device("meta"):
        ours, theirs = build_backbone(arch), getattr(torchvision.models, arch)()
        assert build_backbone("vit_s14").patch_embed.proj.kernel_size == (14, 14)
    names = [name for name in theirs.state_dict() if not name.startswith(("fc.", "head.", "heads."))]
    assert list(ours.state_dict()) == names and ours.feature_dim == features


def test_a_network_without_a_linear_head_is_named():
    with pytest.raises(ValueError, match="SqueezeNet is no linear head"):
        remove_classifier(torchvision.models.squeezenet1_0())


def test_barlow_twins_has_the_published_projector():
    """2048-8192-8192-8192 with batch norm and ReLU after the first two, no biases."""
    with torch.device("meta"):
        network = BarlowTwins("resnet50")
    state = network.state_dict()
    shapes = {name.removeprefix("projector."): list(t.shape) for name, t in state.items() if "proj" in name}
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert shapes.keys() == {"0.weight", "3.weight", "6.weight"} | {f"{i}.{n}" for i in (1, 4) for n in norm}
    assert shapes["0.weight"] == [8192, 2048] and shapes["6.weight"] == shapes["3.weight"] == [8192, 8192]
    assert {name.split(".")[0] for name in state} == {"backbone", "projector"}

    config = dict(arch="resnet8", hidden_dim=12, small_images=False, loss="barlow")
    network = build_network(config)
    assert isinstance(network, BarlowTwins)
    a, b, c = (torch.randn(6, 3, 16, 16) for _ in range(3))
    z = network([a, b])
    assert z.shape == (2, 6, 12)
    torch.testing.assert_close(z[0], network([a, 5 * c])[0])    # each view with its own statistics


@pytest.mark.parametrize("arch, last", [("resnet8", "bn2"), ("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual_is_torchvisions(arch, last):
    backbone = build_backbone(arch)
    zero_init_residual(backbone)
    zeros = {name for name, p in backbone.named_parameters() if name.endswith("weight") and p.eq(0).all()}
    blocks = [name for name, module in backbone.named_modules() if hasattr(module, last)]
    assert zeros == {f"{name}.{last}.weight" for name in blocks if name} and len(zeros) >= 3


def test_unknown_arch_is_named():
    with pytest.raises(ValueError, match="resnet9'.*resnet50w5"):
        build_backbone("resnet9")
    assert "resnet152" in ARCHS


def test_multicrop_forward_equals_separate_backbone_passes():
    torch.manual_seed(0)
    model = Twist("resnet8", num_classes=7, hidden_dim=16).eval()
    views = [torch.randn(3, 3, s, s) for s in (28, 28, 12, 12, 12, 28)]
    with torch.inference_mode():
        expected = [model.projection_heads(model.backbone(view)) for view in views]
        torch.testing.assert_close(model(views), torch.stack(expected))


# ---------------------------------------------------------------- NBS in bunches
def test_bunches_normalise_each_bunch_over_all_its_views():
    torch.manual_seed(0)
    V, bunches, bunch, C = 3, 4, 5, 6
    x = torch.randn(V, bunches * bunch, C, dtype=torch.float64, requires_grad=True)
    nbs = BatchNorm(C, affine=False, bunch_size=bunch).double()
    y = nbs(x.view(-1, C), num_views=V).view(V, -1, C)
    for b in range(bunches):
        mine = slice(b * bunch, (b + 1) * bunch)
        rows = x[:, mine].reshape(-1, C)
        expected = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(y[:, mine].reshape(-1, C), expected)
    rows = x.detach().view(V, bunches, bunch, C).transpose(0, 1).reshape(bunches, -1, C)
    torch.testing.assert_close(nbs.running_mean, 0.1 * rows.mean(1).mean(0))
    torch.testing.assert_close(nbs.running_var, 0.9 + 0.1 * rows.var(1).mean(0))
    assert nbs.num_batches_tracked == 1


def test_bunches_have_exact_gradients():
    torch.manual_seed(0)
    nbs = BatchNorm(3, affine=True, bunch_size=2).double()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(nbs.weight)
    assert torch.autograd.gradcheck(lambda x: nbs(x, num_views=2), x)


@pytest.mark.parametrize("shape", [(12, 5), (4, 5, 3, 2)])
def test_one_bunch_is_torchs_batch_norm(shape):
    torch.manual_seed(0)
    ours, torchs = BatchNorm(5), torch.nn.BatchNorm1d(5) if len(shape) == 2 else torch.nn.BatchNorm2d(5)
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), torchs(x))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_bunch_layout():
    assert bunch_layout(None, 32, 4) == (1, 4)
    assert bunch_layout(8, 32, 4) == (4, 1)
    assert bunch_layout(64, 32, 4) == (1, 2)
    for bunch, images, world in ((24, 32, 4), (96, 32, 4), (1, 32, 4), (256, 32, 4)):
        with pytest.raises(ValueError, match=f"bunch size {bunch} does not fit"):
            bunch_layout(bunch, images, world)


def test_without_nbs_logits_are_the_last_linears():
    head = ProjectionHead(4, 8, 3, nbs=False)
    x = torch.randn(6, 4)
    torch.testing.assert_close(head(x), F.linear(head.projection_head(x), head.last_linear.weight,
                                                 head.last_linear.bias))


def test_synchronising_keeps_names_and_values():
    model = Twist("resnet8", num_classes=4, hidden_dim=8)
    fill(model.state_dict())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    synchronize_batch_norms(model)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# ---------------------------------------------------------------- ViT
def test_vit_takes_any_size_and_has_all_its_features():
    torch.manual_seed(0)
    vit = build_backbone("vit_t").eval()
    with torch.inference_mode():
        for height, width in ((224, 224), (96, 96), (64, 160), (100, 16)):
            x = torch.randn(2, 3, height, width)
            assert vit(x).shape == (2, 192) and vit.positions(height // 16, width // 16).isfinite().all()
            both = vit.features(x, n_last_blocks=2, mean_of_patches=True)
            assert both.shape == (2, 3 * 192)
            torch.testing.assert_close(both[:, 192:384], vit(x))       # the last block's class token
            torch.testing.assert_close(both[:, :384], vit.features(x, 2))
        assert not torch.allclose(vit(x), vit(x.flip(-2))), "positions matter"
    with pytest.raises(ValueError, match="small images: vit_t"):
        build_backbone("vit_t", small_images=True)


def test_drop_path_skips_whole_images_in_training_only():
    torch.manual_seed(0)
    vit, plain = build_backbone("vit_t", drop_path=0.5), build_backbone("vit_t")
    plain.load_state_dict(vit.state_dict())
    assert [round(block.drop_path.p * 22, 6) for block in vit.blocks] == list(range(12))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(vit.eval()(x), plain(x))
        assert not torch.allclose(vit.train()(x), plain(x))
        block = vit.blocks[11]                                 # by half its images, those that stay doubled
        tokens = torch.randn(400, 3, 192)
        skipped = (block.drop_path(tokens) == 0).flatten(1).all(1)
        assert 140 < skipped.sum() < 260
        torch.testing.assert_close(block.drop_path(tokens).abs().max(), 2 * tokens.abs().max())


@pytest.mark.parametrize("arch", ["resnet8", "vit_t"])
def test_build_twist_keeps_the_published_head(arch):
    act = Twist(arch, num_classes=5, hidden_dim=8).projection_heads.projection_head[2]
    assert isinstance(act, torch.nn.GELU if arch == "vit_t" else torch.nn.ReLU)
