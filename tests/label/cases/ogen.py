from unfused.label import OGENClassifier

SMALL = {"epochs": 4, "reduction": 1, "logit_scale": 10.0, "random_state": 0}
ESTIMATORS = [
    (OGENClassifier(**SMALL), {}),
    (OGENClassifier(tuner="both", synthetic=None, teacher=None, **SMALL), {}),
]
ELSEWHERE = {"OGENPromptClassifier": "it needs an image-text model; see tests/label/test_ogen.py"}
