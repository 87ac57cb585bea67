"""Figures of whatever classes are called."""

import warnings

import numpy as np

from yolo.viz.figures import picture_grid


def test_class_names_of_any_script_and_with_signs_of_formulas_are_drawn_without_a_warning() -> None:
    tiles = [(np.zeros((8, 8, 3), np.uint8), name) for name in ("\u732b", "$", "$\\frac$ x_")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture_grid(tiles, "\u72d7 $", 2).shape[2] == 3
