r"""Is it a posterior? Checks with a known answer when it is, each with a p-value.

What a check needs, and what it cannot see by construction:

    needs many simulated data, each with its truth
        coverage        credible regions about references (TARP).  Blind to the prior handed back if
                        the references know nothing of the data; a bias shows only in part.
        sbc             ranks of chosen statistics (total flux, a size, ...).  Blind to what leaves
                        them alone, and to the prior handed back.
        hpd_coverage    highest-density regions.  Blind to an error that the density shares with
                        the draws.
    needs exact draws of one posterior
        pqmass, sliced_wasserstein, mode_weights (the exact weights are enough)
    needs one observation
        chi2, predictive_chi2    do the draws fit the data?  Hardly sees a wrong width.
        convergence              do chains agree?  Says nothing of where they have settled.
    needs one observation, and held-out images once for a prior
        misspecification         is the image like what the prior knows?  Blind to faint features,
                        and to what the data do not show.

p-values are uniform for exact posteriors unless a docstring says otherwise; those of the rank and
coverage checks come from one test, :mod:`diffpost.diagnostics.uniformity`.
"""

from diffpost.diagnostics.chains import Convergence, convergence
from diffpost.diagnostics.coverage import (
    Coverage,
    coverage,
    coverage_from_fractions,
    hpd_coverage,
    hpd_fraction,
    tarp_fraction,
)
from diffpost.diagnostics.misspecification import (
    HeldOutReference,
    Misspecification,
    heldout_reference,
    misspecification,
    reference_from_card,
)
from diffpost.diagnostics.mixtures import ModeWeights, mode_weights
from diffpost.diagnostics.predictive import Chi2, PredictiveChi2, chi2, predictive_chi2
from diffpost.diagnostics.references import references_from_data
from diffpost.diagnostics.sbc import Ranks, ranks, sbc, sbc_from_ranks
from diffpost.diagnostics.twosample import (
    Floor,
    PQMass,
    pqmass,
    sliced_wasserstein,
    sliced_wasserstein_floor,
)

__all__ = [
    "Chi2",
    "Convergence",
    "Coverage",
    "Floor",
    "HeldOutReference",
    "Misspecification",
    "ModeWeights",
    "PQMass",
    "PredictiveChi2",
    "Ranks",
    "chi2",
    "convergence",
    "coverage",
    "coverage_from_fractions",
    "heldout_reference",
    "hpd_coverage",
    "hpd_fraction",
    "misspecification",
    "mode_weights",
    "pqmass",
    "predictive_chi2",
    "ranks",
    "reference_from_card",
    "references_from_data",
    "sbc",
    "sbc_from_ranks",
    "sliced_wasserstein",
    "sliced_wasserstein_floor",
    "tarp_fraction",
]
