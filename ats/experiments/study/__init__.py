"""What the choice of estimator does: to the variance and bias of one draw, and to a training."""
