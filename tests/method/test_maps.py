"""Maps of a ResNet's stages are those of its own forward pass, and dilation is torchvision's."""

import pytest
import torch
import torchvision

from model import build_backbone, dilate, feature_maps, stages_of

LARGE = ("resnet8w2_2x2", "resnet50", "resnet50w2")
RESNETS = ["resnet8", "resnet8_2x2", "resnet18",
           *(pytest.param(arch, marks=pytest.mark.slow) for arch in LARGE)]


def random_network(arch, small_images=False):
    """In evaluation mode, with norms that shift and scale, so that a ReLU that is left out shows."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, small_images).eval()
    for module in backbone.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return backbone


@pytest.mark.parametrize("arch", RESNETS)
@pytest.mark.parametrize("small_images", [False, True])
def test_maps_are_those_of_the_forward_pass(arch, small_images):
    backbone, seen = random_network(arch, small_images), {}
    stages = stages_of(backbone)
    for name in stages:
        getattr(backbone, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.clone()}))
    x = torch.randn(2, 3, 33, 40)
    maps = feature_maps(backbone, stages)
    with torch.inference_mode():
        backbone(x)
        expected, seen = seen, {}
        found = maps(x)
    assert list(found) == stages == [f"layer{i + 1}" for i in range(len(stages))]
    assert all(found[name].equal(expected[name]) for name in stages)
    assert maps.channels == {name: found[name].shape[1] for name in stages}
    assert list(maps.state_dict()) == list(backbone.state_dict())
    assert all(a is b for a, b in zip(maps.parameters(), backbone.parameters(), strict=True))


def test_what_comes_after_the_last_map_is_left_out():
    maps = feature_maps(random_network("resnet8"), ["layer2", "layer1"])
    assert list(maps) == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]
    assert list(maps(torch.randn(1, 3, 16, 16))) == ["layer1", "layer2"]


@pytest.mark.parametrize("arch", RESNETS)
def test_a_dilated_map_holds_the_strided_one(arch):
    backbone = random_network(arch)
    last = stages_of(backbone)[-1]
    maps, x = feature_maps(backbone, [last]), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        strided = maps(x)[last]
        dilate(backbone)
        found = maps(x)[last]
    step = 2 if arch.startswith("resnet8") else 4
    assert found.shape[-2:] == tuple(step * size for size in strided.shape[-2:])
    torch.testing.assert_close(found[:, :, ::step, ::step], strided, rtol=1e-4, atol=1e-4)


def test_dilation_is_torchvisions_to_the_bit():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    ours = torchvision.models.resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    dilate(ours)
    x = torch.randn(1, 3, 65, 64)
    with torch.inference_mode():
        assert ours(x).equal(theirs(x))


@pytest.mark.parametrize("arch, name", [("vit_t", "ViT"), ("mobilenet_v3_large", "MobileNetV3"),
                                        ("efficientnet_b0", "EfficientNet")])
def test_networks_without_stages_are_named(arch, name):
    backbone = build_backbone(arch)
    for refuse in (dilate, lambda backbone: feature_maps(backbone, ["layer1"])):
        with pytest.raises(ValueError, match=f"a {name} has no stages with maps; use a ResNet"):
            refuse(backbone)
    with pytest.raises(ValueError, match="no stage 'layer4'; choose from layer1, layer2, layer3"):
        feature_maps(build_backbone("resnet8"), ["layer1", "layer4"])
