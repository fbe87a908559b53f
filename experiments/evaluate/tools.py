"""What the subjects of one evaluation share: feature networks, and what samples are compared with.

Each is opened when it is first asked for, once a command.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from diffusion.models.inception import PREPROCESSINGS
from experiments.evaluate import references
from experiments.evaluate.features import ClipScorer, FeatureNetwork, Judge, inception


@dataclasses.dataclass
class Tools:
    """Feature networks, and what samples are compared with.

    features: "inception", "classifier" or "clip"; None: the classifier where there is one, else
    Inception. reference: a file, which is made where it is missing; None: made and not kept.
    """

    classifier: pathlib.Path | None = None
    features: str | None = None
    inception_weights: str | None = None
    preprocessing: str = PREPROCESSINGS[0]
    clip_directory: str | None = None
    reference: pathlib.Path | None = None
    reference_split: str = "train"
    reference_num: int = 0
    feature_batch: int = 50
    spatial: bool = False  # sFID's features are wanted as well
    vectors: bool = False  # of the reference
    made: references.Reference | None = None
    samplers: dict[str, Any] = dataclasses.field(default_factory=dict)  # compiled, by what they are

    @functools.cached_property
    def judge(self) -> Judge:
        if self.classifier is None:
            raise ValueError(
                "--classifier is missing: adherence and frechet_distance need the run of "
                "configs/digits_classifier.py, or of another classifier of the same data"
            )
        return Judge(self.classifier)

    @functools.cached_property
    def clip(self) -> ClipScorer:
        if not self.clip_directory:
            raise ValueError("--clip is missing: name a Transformers directory of a CLIPModel")
        return ClipScorer(self.clip_directory)

    @property
    def feature_name(self) -> str:
        return self.features or ("classifier" if self.classifier else "inception")

    @functools.cached_property
    def network(self) -> FeatureNetwork:
        if self.feature_name == "classifier":
            return self.judge.network()
        if self.feature_name == "clip":
            return self.clip.network()
        return inception(self.inception_weights, self.preprocessing, self.feature_batch)
