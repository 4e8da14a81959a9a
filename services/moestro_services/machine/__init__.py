"""What this machine has and lacks for Moestro: `hardware`, `software`, `folder` look, `examine` brings it together."""

from moestro_services.machine.examine import Examination, Lack, examine

__all__ = ["Examination", "Lack", "examine"]
