ELSEWHERE = {
    "VisionTherapy": "it takes images of any kind, class probabilities and a verifier; see tests/label/test_vision_therapy.py"
}
