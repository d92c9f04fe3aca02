"""Pictures: arrays in, a ``.png``, ``.svg`` or ``.html`` file out. Knows nothing of models."""

from __future__ import annotations

from protea.plot.contact_maps import contact_map
from protea.plot.growth import days_to_train
from protea.plot.pictures import check_kind, check_place, share_script
from protea.plot.profiles import profile
from protea.plot.scan import single_site_scan

__all__ = ["check_kind", "check_place", "contact_map", "days_to_train", "profile", "share_script", "single_site_scan"]
