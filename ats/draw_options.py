"""Options of how cells are drawn, as properties that are checked together."""

from ats._modules import SealedModule
from ats.cells import check_flag, check_goes_together
from ats.samples import Estimator, Selection
from ats_kernels.checks import check_choice
from ats_kernels.pooling.op import check_estimator
from ats_kernels.sampling.draws import METHODS


class EstimatorOption(SealedModule):
    """`estimator`, which must go with the class's own `replace`."""

    _estimator: Estimator = "ordered"
    replace: bool

    @property
    def estimator(self) -> Estimator:
        """What random draws are pooled by: "ordered" or "unordered"."""
        return self._estimator

    @estimator.setter
    def estimator(self, value: Estimator) -> None:
        check_estimator(value, replace=self.replace)
        self._estimator = value


class DrawOptions(SealedModule):
    """`selection` and `replace`, of which the second must go with the first and with `_estimator`."""

    _selection: Selection = "sample"
    _replace = False
    _estimator: Estimator = "ordered"

    @property
    def selection(self) -> Selection:
        """How cells are chosen: "sample" or "topk"."""
        return self._selection

    @selection.setter
    def selection(self, value: Selection) -> None:
        check_choice("selection", value, METHODS)
        check_goes_together(value, replace=self._replace)
        self._selection = value

    @property
    def replace(self) -> bool:
        """Whether cells are drawn with replacement."""
        return self._replace

    @replace.setter
    def replace(self, value: bool) -> None:
        check_flag("replace", value)
        check_goes_together(self._selection, replace=value)
        check_estimator(self._estimator, replace=value)
        self._replace = value
