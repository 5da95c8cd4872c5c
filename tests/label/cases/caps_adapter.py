from unfused.label import MAdapterClassifier

ESTIMATORS = [
    (MAdapterClassifier(), {}),
    (MAdapterClassifier(distribution="feature", gamma=1.0, alpha=2.0), {}),
]
