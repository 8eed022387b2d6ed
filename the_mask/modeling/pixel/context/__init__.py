"""Context blocks: what a pixel learns from its surroundings, from past frames and from the whole data set."""

from the_mask.modeling.pixel.context import priors as priors
