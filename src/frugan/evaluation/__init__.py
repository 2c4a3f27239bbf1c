"""How good generated images are: metrics and the features that they are taken on."""
