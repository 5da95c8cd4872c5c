from unfused.label import TFUPClassifier, TFUPTClassifier

ESTIMATORS = [
    (TFUPClassifier(), {}),
    (TFUPTClassifier(epochs=4, warmup_epochs=2, learning_rate=0.003, random_state=0), {}),
]
