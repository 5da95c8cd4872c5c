from unfused.label import GDAClassifier

ESTIMATORS = [
    (GDAClassifier(), {}),
    (GDAClassifier(shrinkage="pooled", normalize=False, priors="empirical"), {}),
]
