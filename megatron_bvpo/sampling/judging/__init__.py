"""Samples to judgements: is the final answer right?"""
