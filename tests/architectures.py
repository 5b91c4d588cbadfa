"""Public architectures in a few lines each, with where their cells lie worked out by hand."""

import copy
import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn

import ats


def conv(inputs, outputs, kernel=3, stride=1, padding=None, **options):
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False, **options), nn.ReLU())


class Add(nn.Module):
    """A residual block: a branch beside the identity or a shortcut of its own."""

    def __init__(self, branch, shortcut=None):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, maps):
        return self.branch(maps) + self.shortcut(maps)


def resnet(stages, *, bottleneck=False):
    """Its stem, and the first block of each stage: He et al. 2016, with the stride on the 3×3."""
    layers = [nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage in range(stages):
        stride = 1 if stage == 0 else 2
        if bottleneck:
            branch = nn.Sequential(conv(8, 4, 1), conv(4, 4, 3, stride), conv(4, 8, 1), nn.BatchNorm2d(8))
        else:
            branch = nn.Sequential(conv(8, 8, 3, stride), conv(8, 8), nn.BatchNorm2d(8))
        layers += [Add(branch, nn.Conv2d(8, 8, 1, stride) if stride > 1 else None), nn.ReLU()]
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, pool):
        super().__init__()
        self.pool, self.gate = pool, nn.Conv2d(channels, channels, 1)

    def forward(self, maps):
        return maps * self.gate(self.pool(maps)).sigmoid()


class Mean(nn.Module):
    def forward(self, maps):
        return maps.mean((2, 3), keepdim=True)


def inverted_residual(channels, kernel=3, stride=1, gate=None):
    """MobileNet v2 and v3, EfficientNet: expand, depthwise, squeeze and excite, project."""
    gates = [SqueezeExcite(2 * channels, gate)] if gate else []
    wide = conv(channels, 2 * channels, 1)
    depthwise = conv(2 * channels, 2 * channels, kernel, stride, groups=2 * channels)
    branch = nn.Sequential(wide, depthwise, *gates, nn.Conv2d(2 * channels, channels, 1))
    return Add(branch) if stride == 1 else branch


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Hardswish(), inverted_residual(4, 3, 2), inverted_residual(4, 3, 2, Mean())
    )


def efficientnet():
    pool = nn.AdaptiveAvgPool2d(1)
    blocks = [inverted_residual(4, kernel, stride, pool) for kernel, stride in ((3, 1), (3, 2), (5, 2), (5, 1), (3, 2))]
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), *blocks)


class LayerNorm(nn.Module):
    """Of channels, by hand, as ConvNeXt's channels-first one."""

    def forward(self, maps):
        centred = maps - maps.mean(1, keepdim=True)
        return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


class GlobalResponse(nn.Module):
    """Of ConvNeXt v2, channels last."""

    def forward(self, rows):
        response = torch.norm(rows, p=2, dim=(1, 2), keepdim=True)
        return rows * response / (response.mean(-1, keepdim=True) + 1e-6) + rows


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, then channels last: layer norm, and two linear layers around the global response."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.wide = nn.LayerNorm(channels), nn.Linear(channels, 2 * channels)
        self.response, self.narrow = GlobalResponse(), nn.Linear(2 * channels, channels)

    def forward(self, maps):
        rows = F.gelu(self.wide(self.norm(self.depthwise(maps).permute(0, 2, 3, 1))))
        return maps + self.narrow(self.response(rows)).permute(0, 3, 1, 2)


def convnext():
    stem = [nn.Conv2d(3, 6, 4, 4), LayerNorm(), ConvNeXtBlock(6)]
    return nn.Sequential(*stem, LayerNorm(), nn.Conv2d(6, 6, 2, 2), ConvNeXtBlock(6))


class UNetDecoder(nn.Module):
    """Down by 8 and up to 2, with the skip at 2 and 4: Ronneberger et al. 2015, padded as is usual today."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(conv(inputs, 4) for inputs in (3, 4, 4, 4))
        self.up = nn.ModuleList(nn.ConvTranspose2d(4, 4, 2, 2, bias=False) for _ in range(2))
        self.join = nn.ModuleList(conv(8, 4) for _ in range(2))
        self.pool = nn.MaxPool2d(2)

    def forward(self, view):
        half = self.pool(self.down[0](view))
        quarter = self.pool(self.down[1](half))
        maps = self.down[3](self.pool(self.down[2](quarter)))
        for up, join, skip in zip(self.up, self.join, (quarter, half), strict=True):
            maps = join(torch.cat([up(maps), skip], 1))
        return maps


class PatchTokens(nn.Module):
    """A ViT's patch embedding behind a convolutional stem (Xiao et al. 2021), on tokens (B, N, C) and back."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 4, 3, 2), conv(4, 4, 3, 2))
        self.embed, self.norm, self.mlp = nn.Conv2d(4, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, view):
        maps = self.embed(self.stem(view))
        tokens = maps.flatten(2).transpose(1, 2)
        tokens = tokens + self.mlp(self.norm(tokens))
        return tokens.transpose(1, 2).unflatten(2, maps.shape[2:])


class Same(nn.Module):
    """TensorFlow's 'same': as many cells as ⌈pixels/stride⌉, and what padding is odd goes to the far side."""

    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)

    def forward(self, maps):
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        pads = [max(0, (math.ceil(n / stride) - 1) * stride + kernel - n) for n in maps.shape[2:]]
        return self.conv(F.pad(maps, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2]))


def centred(step):
    """Origin and step of cells whose first is centred on the first pixel."""
    return Fraction(1 - step, 2), step


NETWORKS = {
    # name: (network, origin, step), the latter two of both axes, or of (y, x)
    "ResNet stem": (lambda: resnet(0), *centred(4)),
    "ResNet stage 2": (lambda: resnet(2), Fraction(-7, 2), 8),
    "ResNet stage 3": (lambda: resnet(3, bottleneck=True), *centred(16)),
    "ResNet stage 4": (lambda: resnet(4), *centred(32)),
    "MobileNet": (mobilenet, *centred(8)),
    "EfficientNet": (efficientnet, *centred(16)),
    "ConvNeXt": (convnext, 0, 8),
    "ViT with a convolutional stem": (PatchTokens, Fraction(-3, 2), 16),
    "U-Net decoder": (UNetDecoder, 0, 2),
    "dilated stage": (lambda: nn.Sequential(conv(3, 4, 7, 2), conv(4, 4, 3, padding=2, dilation=2)), *centred(2)),
    "dilated and unpadded": (lambda: conv(3, 4, 3, padding=0, dilation=4), 4, 1),
    "unpadded": (
        lambda: nn.Sequential(conv(3, 4, 3, padding=0), conv(4, 4, 5, 2, 0), nn.MaxPool2d(3, 2)),
        Fraction(7, 2),
        4,
    ),
    "one side padded more": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, 4, 3, 2, 0)), Fraction(1, 2), 2),
    "causal along x": (lambda: nn.Sequential(nn.ZeroPad2d((4, 0, 1, 1)), conv(3, 4, (3, 5), padding=0)), (0, -2), 1),
    "axes that differ": (
        lambda: nn.Sequential(conv(3, 4, (7, 3), (4, 2), (3, 0)), nn.MaxPool2d((1, 2), (1, 2))),
        (Fraction(-3, 2), Fraction(1, 2)),
        (4, 4),
    ),
    "rounded up": (lambda: nn.Sequential(conv(3, 4), nn.MaxPool2d(3, 2, ceil_mode=True)), Fraction(1, 2), 2),
}


def attention_network(name):
    """The network of a name, with a 1×1 convolution to logits, and where its cells lie."""
    torch.manual_seed(0)
    make, origin, step = NETWORKS[name]
    trunk = make()
    outputs = trunk(torch.zeros(1, 3, 64, 64)).shape[1]
    return nn.Sequential(trunk, nn.Conv2d(outputs, 1, 1, bias=False)), ats.Placement(origin, step)


def averaging(network):
    """The same geometry in float64 with weights that are positive and equal, so that responses are symmetric."""
    network = copy.deepcopy(network).double().eval()
    for parent in network.modules():
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                options = layer.kernel_size, layer.stride, layer.padding
                setattr(parent, name, nn.AvgPool2d(*options, ceil_mode=layer.ceil_mode))
            elif isinstance(layer, nn.LayerNorm | LayerNorm | GlobalResponse | nn.BatchNorm2d | SqueezeExcite):
                setattr(parent, name, nn.Identity())
    for name, parameter in network.named_parameters():
        parameter.data.fill_(0 if "bias" in name else 1 / parameter[0].numel())
    return network
