"""What a report says about each number, method and part, in one line each; ``docs/metrics.md`` says more."""

from __future__ import annotations

from typing import Final

WORDS: Final = {
    "accuracy": "share of predictions that are right",
    "accuracy_per_protein": "share that is right in each protein, then the mean over proteins",
    "balanced_accuracy": "share that is right of each class, then the mean over classes",
    "mcc": "correlation of predicted and true classes: 1 is perfect, 0 is chance; rare classes count too",
    "macro_f1": "how well each class is found without false hits, then the mean over classes: 1 is perfect",
    "auroc": "how often a true case is more probable than a false one: 1 is perfect, 0.5 is a random order",
    "auprc": "share of true cases among the most probable: 1 is perfect, a random order gives the share of true cases",
    "log_loss": "how wrong the probabilities are: 0 is perfect",
    "spearman": "how well the order of predictions is that of measured values: 1 is the same, 0 none, -1 the reverse",
    "pearson": "how close to a straight line predictions and measured values lie: 1 is a line, 0 none",
    "rmse": "typical error in the unit of the target, where large errors weigh more: 0 is perfect",
    "mse": "mean squared error: 0 is perfect",
    "mae": "mean error in the unit of the target: 0 is perfect",
    "r2": "1 is perfect; always predicting the mean gives 0",
    "ndcg": "how high the measured values of the best tenth by prediction are: 1 is the best order",
    "top_recall": "share of the best tenth by measurement that is in the best tenth by prediction",
    "macro_auroc": "how often a protein with a label is above one without, mean over labels: 1 is perfect, 0.5 random",
    "macro_auprc": "share of true cases among the most probable, mean over labels: 1 is perfect",
    "micro_auroc": "as macro_auroc, with all labels in one order, so that frequent ones count more",
    "micro_auprc": "as macro_auprc, with all labels in one order, so that frequent ones count more",
    "f1max": "balance of found and false labels at the best threshold: 1 is perfect",
    "stated_coverage": "how often intervals or sets shall hold the truth",
    "temperature": "by what logits are divided; above 1, the model was too sure",
    "log_loss_before": "how wrong the model's own probabilities are: 0 is perfect",
    "log_loss_after": "the same for calibrated probabilities",
    "calibration_error_before": "mean distance of probability and share that is right: 0 is perfect",
    "calibration_error_after": "the same for calibrated probabilities",
    "coverage": "how often intervals or sets did hold the truth",
    "interval_width": "width of the intervals, in the unit of the target",
    "set_size": "mean number of classes in a set",
}
"""By number."""

METHODS: Final = {
    "predictor": "what was trained here",
    "constant": "the same prediction for all: the mean, or the shares of the classes",
    "composition": "a linear model of the shares of amino acids and of length",
    "one-hot": "a linear model of the residues, without a language model",
    "nearest": "the label of the most similar training sequence, or of the most similar stretch around a residue",
    "random weights": "the same head on a model with random weights: what pre-training adds is the difference",
    "frozen": "a head is trained on the hidden states of the model, which stays as it is",
    "lora": "small matrices are trained beside the weights of the model, and a head",
    "full": "all weights of the model are trained, and a head",
}
"""By baseline and by method of training."""

HEADS: Final = {
    "linear": "one linear layer",
    "mlp": "one hidden layer",
    "cnn": "two convolutions along the residues",
    "light-attention": "a weighted mean over the residues, with learned weights, and their maximum",
    "hf": "as in transformers' EsmForSequenceClassification and EsmForTokenClassification",
}

KINDS: Final = {"class": "one of several classes", "value": "a value", "labels": "any of several labels"}

PARTS: Final = {
    "train": "training",
    "validation": "choices: when to stop, layer, penalty, seed",
    "calibration": "temperature, intervals and sets",
    "test": "the numbers below; used once, at the end",
}

TOLD: Final = {
    "interval": "In parentheses: 95 % intervals, what another draw of test proteins could have given. They do not "
    "cover other training data or seeds.",
    "difference": "Both methods are measured on the same resamples of proteins, so a difference has its own 95 % "
    "interval. If it holds 0, the two are not distinguishable. Flips: share of resamples with no difference or the "
    "other sign.",
    "folds": "Each fold was tested on other examples; its page says more.",
    "reliability": "On the dotted line, a probability of 0.7 is right 7 times in 10; below it, the predictor is too "
    "sure. Before and after: the model's own probabilities, and those at the temperature.",
    "uncalibrated": "Nothing was calibrated, so predictions have no intervals. The notes say why.",
    "identity": "Test examples by identity to the most similar training sequence. A predictor that only remembers is "
    "good at high identity alone. Numbers of few examples say little.",
    "training": "Loss: how wrong predictions are, lower is better. Training keeps the best number on the validation "
    "part. Layer 0 is the input embedding.",
    "choices": "All examples but those of test and calibration were divided into inner folds, and each was predicted "
    "once. The candidate with the highest mean was chosen; of equal ones, the one with the least loss.",
    "seeds": "The same training from other random numbers. The seed that is best on the validation part was kept.",
    "use": "Where the column far is true, a protein is unlike the training data: trust its predictions less.",
    "pairs": "The table needs the columns sequence and sequence_2.",
}
"""By section."""
