"""Efficient architecture search on CIFAR-10's micro space with a normalised LSTM controller.

Source: section 4.4; Pham et al., Efficient Neural Architecture Search via Parameter Sharing, 2018.
"""
