"""Tasks for recurrent networks: made from a key, or read from installed packages."""

from ._common import Dataset as Dataset, Sample as Sample
from ._digits import (
    permuted_digits as permuted_digits,
    sequential_digits as sequential_digits,
)
from ._forecast import (
    henon as henon,
    lorenz as lorenz,
    mackey_glass as mackey_glass,
)
from ._integration import (
    flip_flop as flip_flop,
    integrator as integrator,
    rotation as rotation,
)
from ._memory import (
    adding as adding,
    anbn as anbn,
    copy as copy,
    delayed_match_to_sample as delayed_match_to_sample,
    evidence_accumulation as evidence_accumulation,
    store_recall as store_recall,
)
from ._series import (
    basic_motions as basic_motions,
    gun_point as gun_point,
    japanese_vowels as japanese_vowels,
)
