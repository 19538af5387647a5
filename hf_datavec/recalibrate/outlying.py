"""Sites whose shared statistics are so unlike the others' that damage or malice explains them better than images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_datavec.recalibrate.sites import Sites, layer_names, of_site

if TYPE_CHECKING:
    import torch

# With fewer, nothing says which of them is unlike the others.
FEWEST = 3
# Four sites with inverted, faint and bright scanners differ by up to 26,000 times and 51 standard deviations in single
# channels of EfficientNet-Lite0, four sites with skin lesions by 47 times and one (docs/restoration.md).
VARIANCES, DEVIATIONS = 1e6, 1e3
# A channel that is still at most sites has no spread to measure by.
STILL = 1e-8


def outlying(sites: Sites) -> tuple[str, ...]:
    """The sites with a channel beyond what images explain, held against the median of all sites that share."""
    import torch

    if not sites.shared or len(sites.members) < FEWEST:
        return ()
    each = [of_site(sites.base, one) for one in sites.members]
    found = torch.zeros(len(each), dtype=torch.bool)
    for name in layer_names(sites.base):
        means = torch.stack([one[name].mean for one in each])
        variances = torch.stack([one[name].variance for one in each])
        found |= _beyond(means, variances)
    return tuple(one.name for one, far in zip(sites.members, found.tolist(), strict=True) if far)


def _beyond(means: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """For means and variances (sites, channels): which sites are far from the median in any channel."""
    usual = variances.median(dim=0).values.clamp(min=STILL)
    shifts = (means - means.median(dim=0).values).abs() / usual.sqrt()
    far: torch.Tensor = ((variances > VARIANCES * usual) | (shifts > DEVIATIONS)).any(dim=1)
    return far
