"""What depth can and cannot represent: the theorems as code.

Every invertible linear map as a short stack of couplings (:mod:`.linear_maps`, of
:mod:`.linear_coupling`), and with it any flow on one fixed partition
(:mod:`.fixed_partition`); universality by hidden digits (:mod:`.three_couplings`); and
a law that shallow stacks of small couplings must miss (:mod:`.depth_bound`).
"""

from . import (
    depth_bound as depth_bound,
    fixed_partition as fixed_partition,
    linear_coupling as linear_coupling,
    linear_maps as linear_maps,
    three_couplings as three_couplings,
)
