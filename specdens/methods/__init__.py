"""The iterations behind the estimators, each as pure ``init``, ``step`` and ``finish``."""
