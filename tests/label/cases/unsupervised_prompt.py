ELSEWHERE = {"BlackBoxPromptLearner": "it reads texts, which the checks of scikit-learn do not give"}
