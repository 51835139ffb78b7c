(() => {
  const width = innerWidth;
  const inBox = element => element.closest(".scroll, .highlight code, .md-typeset__scrollwrap");
  const shows = element => {
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    return box.width > 0 && box.height > 0 && style.visibility !== "hidden" && style.opacity !== "0";
  };
  const named = element => `${element.tagName} ${element.className.baseVal ?? element.className}: ` +
    (element.textContent || element.alt || "").trim().slice(0, 40);
  const ownText = element => [...element.childNodes].some(
    node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
  const all = [...(document.querySelector("article") ?? document.querySelector("main")).querySelectorAll("*")].filter(shows);
  const words = all.filter(ownText);

  // beside the page, unless in a box that moves
  const outside = all.filter(element => !inBox(element)).filter(element => {
    const box = element.getBoundingClientRect();
    return box.left < -0.5 || box.right > width + 0.5;
  });
  // wider than its own box, which neither wraps nor moves
  const cut = all.filter(element => {
    const style = getComputedStyle(element);
    return element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0 &&
      ["hidden", "clip"].includes(style.overflowX);
  });
  // words of a drawing beyond its edge
  const beyond = [...document.querySelectorAll("main svg text")].filter(text => {
    const view = text.ownerSVGElement.viewBox.baseVal, box = text.getBBox();
    return view.width > 0 && (box.x < view.x || box.y < view.y ||
      box.x + box.width > view.x + view.width || box.y + box.height > view.y + view.height);
  });
  // words over words
  const overlapping = [...document.querySelectorAll(".bars li, tr")].filter(row => {
    const boxes = [...row.children].map(cell => cell.getBoundingClientRect());
    return boxes.some((one, at) => boxes.slice(at + 1).some(other =>
      one.left < other.right - 1 && other.left < one.right - 1 &&
      one.top < other.bottom - 1 && other.top < one.bottom - 1));
  });

  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => {
    const [r, g, b] = colour.map(part => part / 255).map(
      part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const contrast = element => {
    const style = getComputedStyle(element);
    const ink = rgba(element.ownerSVGElement ? style.fill : style.color);
    const [dark, bright] = [light(ink), light(behind(element))].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };

  const images = [...document.querySelectorAll("main img")].map(image => {
    const box = image.getBoundingClientRect();
    return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height,
            natural: image.naturalWidth};
  });
  return {
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    paper: behind(document.body),
    outside: outside.map(named), cut: cut.map(named), beyond: beyond.map(named),
    overlapping: overlapping.map(named),
    faint: words.filter(element => contrast(element) < 4.5).map(
      element => `${named(element)} ${contrast(element).toFixed(1)}`),
    small: words.filter(element => parseFloat(getComputedStyle(element).fontSize) < 10.5).map(named),
    images,
  };
})()
