"""MosaicML Composer: methods as algorithms of its Trainer, and monitors as its callbacks."""

from composer_sam.trainers.composer.geometry_monitor import GradientGeometryMonitor
from composer_sam.trainers.composer.sharpness_monitor import SharpnessMonitor

__all__ = ['GradientGeometryMonitor', 'SharpnessMonitor']
