ELSEWHERE = {
    "FrozenEncoder": "it reads paths, pictures and texts, not numbers; see tests/data/test_frozen_encoder.py"
}
