"""Context blocks: what a pixel learns from its surroundings, from past frames and from the whole data set."""
