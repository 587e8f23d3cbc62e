"""The patch discriminator (pix2pix: Isola 2017, Sec. 3.2.2 and App. 6.1.2; VQGAN's too)."""

from torch import Tensor, nn

from tf_lightning.autoencoder_network import at_least_float32


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches, 70 x 70 pixels with three halvings.

    Instance norm, which pix2pix has at batch size 1, in place of batch norm: what is said of a
    picture then depends on no other picture and on no rank.

    Args:
        width: channels of the first convolution; they double up to eight times that.
        num_halvings: convolutions of stride 2.
    """

    def __init__(self, width: int = 64, num_halvings: int = 3):
        super().__init__()
        widths = [width * min(2**n, 8) for n in range(num_halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
            stride = 2 if number < num_halvings else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.InstanceNorm2d(after, affine=True),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, spread 0.02, as in pix2pix."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            if isinstance(layer, nn.InstanceNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of pictures (B, 3, H, W) in [-1, 1]; higher = real."""
        return at_least_float32(self.layers(images))
