"""What a page is measured by: contrast of its text, size of its targets, names of its parts (WCAG 2.2)."""

import re

NAMED_ROLES = {"button", "textbox", "combobox", "spinbutton", "link", "checkbox", "dialog", "navigation", "log"}

CONTRASTS = """() => {
  const isClear = (color) => /^rgba\\(.*, 0\\)$/.test(color) || color === 'transparent';
  const behind = (each) => {
    for (let box = each; box; box = box.parentElement) {
      const color = getComputedStyle(box).backgroundColor;
      if (!isClear(color)) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const isSeen = (each) => each.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !each.closest('.unseen, .skip');
  const dialog = document.querySelector('dialog[open]') ?? document.body;
  return [...dialog.querySelectorAll('*')].filter((each) => isSeen(each)
    && ([...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || each.matches('input, select, textarea')))
    .map((each) => [`${each.tagName} ${each.textContent.trim().slice(0, 30)}`, getComputedStyle(each).color, behind(each)]);
}"""

SMALL_TARGETS = """() => [...document.querySelectorAll('button, select, input:not([disabled]), textarea, summary')]
  .filter((each) => each.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
  .map((each) => [each.id || each.name || each.textContent, each.getBoundingClientRect()])
  .filter(([, box]) => box.width < 43.9 || box.height < 43.9)
  .map(([name, box]) => `${name}: ${Math.round(box.width)} x ${Math.round(box.height)}`)"""


def contrast(front: str, behind: str) -> float:
    """Return the contrast ratio of two CSS colours (WCAG 2.2, success criterion 1.4.3)."""
    lighter, darker = sorted((luminance(front), luminance(behind)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`."""
    parts = [int(number) / 255 for number in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
