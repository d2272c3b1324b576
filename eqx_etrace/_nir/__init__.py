from ._api import from_nir as from_nir, to_nir as to_nir
