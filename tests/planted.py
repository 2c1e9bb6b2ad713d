"""Paired activations whose latents are known: what a crosscoder ought to find.

    from planted import Planted

    world = Planted()                       # 16 latents, two models, width 16
    acts_NSD = world.draw(1000)             # [1000, 2, 16]
    world.directions_FSD, world.kinds       # "shared", "exclusive" (second model only) or "rotated"

Each token shows a few latents at random strengths. The two models have means and scales of their own, so that
a forgotten normalisation shows."""

import torch


class Planted:
    """Two models that share most of their latents."""

    def __init__(self, latents=16, width=16, exclusive=2, rotated=2, shows=0.12, noise=0.02, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(latents, width, generator=generator)
        other = torch.randn(latents, width, generator=generator)
        self.directions_FSD = torch.nn.functional.normalize(torch.stack([shared, shared], 1), dim=2)
        self.kinds = ["shared"] * (latents - exclusive - rotated) + ["exclusive"] * exclusive
        self.kinds += ["rotated"] * rotated
        for number, kind in enumerate(self.kinds):
            if kind == "exclusive":
                self.directions_FSD[number, 0] = 0
            if kind == "rotated":
                self.directions_FSD[number, 1] = torch.nn.functional.normalize(other[number], dim=0)
        self.mean_SD = torch.randn(2, width, generator=generator) * torch.tensor([[3.0], [2.0]])
        self.scale_S = torch.tensor([5.0, 7.0])
        self.shows, self.noise = shows, noise

    def codes(self, n, seed=0):
        """How strongly each latent shows on each of `n` tokens [N, F]."""
        generator = torch.Generator().manual_seed(1000 + seed)
        there = torch.rand(n, len(self.kinds), generator=generator) < self.shows
        return there * (0.5 + torch.rand(n, len(self.kinds), generator=generator))

    def draw(self, n, seed=0):
        """Activations of `n` tokens [N, 2, D]."""
        generator = torch.Generator().manual_seed(2000 + seed)
        clean = torch.einsum("nf,fsd->nsd", self.codes(n, seed), self.directions_FSD)
        noisy = clean + self.noise * torch.randn(clean.shape, generator=generator)
        return noisy * self.scale_S[:, None] + self.mean_SD

    def batches(self, n=20_000, size=1000):
        """The same as a list, to be read as often as one likes."""
        return list(self.draw(n).split(size))


def found(world, crosscoder):
    """For each planted latent the largest cosine with a learnt one, decoders of both models together."""
    kept = [
        torch.nn.functional.normalize(one.flatten(1).double(), dim=1)
        for one in (world.directions_FSD, crosscoder.decoder_FSD)
    ]
    return (kept[0] @ kept[1].T).max(1)


def exact_crosscoder(world):
    """The crosscoder of the truth: decoders are the planted directions, encoders undo them."""
    from concept_tda.concepts.crosscoders import Crosscoder

    decoder_FSD = world.directions_FSD.clone()
    latents, sources, width = decoder_FSD.shape
    encoder_SDF = torch.linalg.pinv(decoder_FSD.flatten(1)).unflatten(0, (sources, width))
    return Crosscoder(
        ("base:1", "tuned:1"),
        encoder_SDF,
        decoder_FSD,
        torch.zeros(latents),
        torch.zeros(sources, width),
        world.mean_SD,
        world.scale_S,
        threshold=0.3,
    )
