from __future__ import annotations

from unfused.label import DDFA

ONE_DOMAIN = "scikit-learn passes no domains, and in a single domain no class can be told from another: all are class 0"

ESTIMATORS = [(DDFA(), {"check_clustering": ONE_DOMAIN})]
