"""Towers whose matrices are 8-bit integers: conversion, layers, products, and what calibration moves."""
