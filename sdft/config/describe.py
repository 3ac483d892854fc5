"""What a config trains, in words."""

from sdft.config.sections import Config


def describe(config: Config) -> str:
    """What the config trains, in one or two sentences: the first line that a run prints."""
    shown = "" if config.teacher.context == "none" else f", shown the demonstration ({config.teacher.context}),"
    if not config.method.needs_teacher:
        on = {
            "demonstrations": "the demonstrations",
            "offline": f"completions that the model{shown} samples before the first step",
        }[config.method.completions]
        how = {"sft": "", "dft": ", each token weighted by the probability that the student gives it"}
        return f"{config.loss.method.upper()}: cross-entropy of the student on {on}{how[config.loss.method]}."
    direction = {
        "reverse_kl": "reverse KL, KL(student || teacher)",
        "forward_kl": "forward KL, KL(teacher || student)",
        "jsd": f"generalized JSD with beta = {config.loss.beta:g}",
    }[config.loss.divergence]
    teacher = {
        "ema": f"the student's moving average (alpha = {config.teacher.ema_alpha:g})",
        "base": f"the weights of {config.teacher.model}"
        if config.teacher.model
        else "the student's weights at the start",
        "live": "the current student",
    }[config.teacher.kind]
    sees = "just the prompt" if config.teacher.context == "none" else f"the demonstration ({config.teacher.context})"
    who = {
        "student": "the student's own samples",
        "teacher": "the teacher's samples",
        "mixed": "samples of the student and of the teacher, in turns",
        "offline": "samples that the teacher draws before the first step",
    }[config.rollout.source]
    masked = f", first {config.loss.mask_first} tokens masked" if config.loss.mask_first else ""
    mean = {
        "token": "mean over all completion tokens",
        "sequence": "mean of each completion, then of the completions",
    }[config.loss.average]
    return f"SDFT: {direction}, on {who}{masked}; {mean}. Teacher: {teacher}, which sees {sees}."
