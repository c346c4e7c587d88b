/*
 * Finds every occurrence of many needles in one pass.
 *
 * Run by whoever searches memory for private keys, as root. A key has up to sixty needles, so a
 * search with memmem(3) reads everything sixty times. This one takes steps (Wu and Manber, "A fast
 * algorithm for multi-pattern searching", 1994): it looks at the two octets at the end of a window,
 * and moves the window as far as no needle can be missed, mostly by its whole length. The window is
 * as long as the shortest needle. Python threads run meanwhile.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define MAX_WINDOW 255
/* How many steps are looked at together. */
#define AHEAD 8
#define PAIR(octets) ((octets)[0] << 8 | (octets)[1])

struct needle {
	const char *octets;
	Py_ssize_t length;
};

struct search {
	struct needle *needles;
	Py_ssize_t count;
	Py_ssize_t window;
	/* By the two octets at the window's end: how far it may be moved. */
	uint8_t step[1 << 16];
	/* By two octets: whether a needle begins with them. Memory is full of what a needle ends with. */
	uint8_t begins[1 << 16];
	/* What was found: places, each followed by its needle's number. */
	Py_ssize_t *found;
	Py_ssize_t pairs, most;
};

static void prepare(struct search *search)
{
	Py_ssize_t window = MAX_WINDOW;
	for (Py_ssize_t number = 0; number < search->count; number++)
		if (search->needles[number].length < window)
			window = search->needles[number].length;
	search->window = window;
	memset(search->step, window > 1 ? (int)window - 1 : 0, sizeof(search->step));
	for (Py_ssize_t number = 0; number < search->count; number++) {
		const uint8_t *octets = (const uint8_t *)search->needles[number].octets;
		if (window > 1)
			search->begins[PAIR(octets)] = 1;
		for (Py_ssize_t end = 2; end <= window; end++) {
			uint8_t *step = &search->step[PAIR(octets + end - 2)];
			if (window - end < *step)
				*step = (uint8_t)(window - end);
		}
	}
}

/* Whether so many whole steps follow each other. To know it, none of them waits for the one before. */
static int are_whole_steps(const struct search *search, const uint8_t *end)
{
	const Py_ssize_t whole = search->window - 1;
	int others = 0;
	for (int ahead = 0; ahead < AHEAD; ahead++)
		others |= search->step[PAIR(end + ahead * whole)] ^ whole;
	return others == 0;
}

static void scan(struct search *search, const uint8_t *octets, Py_ssize_t length)
{
	const Py_ssize_t last = length - search->window, whole = search->window - 1;
	for (Py_ssize_t at = 0; at <= last;) {
		if (search->window > 1) {
			const uint8_t *end = octets + at + search->window - 2;
			uint8_t step = search->step[PAIR(end)];
			if (step == whole && last - at > AHEAD * whole && are_whole_steps(search, end)) {
				at += AHEAD * whole;
				continue;
			}
			if (step > 0 || !search->begins[PAIR(octets + at)]) {
				at += step > 0 ? step : 1;
				continue;
			}
		}
		for (Py_ssize_t number = 0; number < search->count; number++) {
			const struct needle *needle = &search->needles[number];
			if (needle->length > length - at || memcmp(octets + at, needle->octets, needle->length) != 0)
				continue;
			if (search->pairs == search->most)
				return;
			search->found[2 * search->pairs] = at;
			search->found[2 * search->pairs++ + 1] = number;
		}
		at++;
	}
}

static PyObject *as_list(const struct search *search)
{
	PyObject *list = PyList_New(0);
	for (Py_ssize_t pair = 0; list != NULL && pair < search->pairs; pair++) {
		const Py_ssize_t *found = &search->found[2 * pair];
		PyObject *item = Py_BuildValue("(nn)", found[0], found[1]);
		if (item == NULL || PyList_Append(list, item) < 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	return list;
}

static PyObject *occurrences(PyObject *module, PyObject *arguments)
{
	Py_buffer octets;
	PyObject *needles, *list = NULL;
	Py_ssize_t most;
	(void)module;
	if (!PyArg_ParseTuple(arguments, "y*O!n", &octets, &PyTuple_Type, &needles, &most))
		return NULL;
	struct search *search = PyMem_Calloc(1, sizeof(*search));
	if (search == NULL || most < 1 || most > PY_SSIZE_T_MAX / 2 / (Py_ssize_t)sizeof(Py_ssize_t)) {
		PyErr_SetString(PyExc_ValueError, "no room");
		goto end;
	}
	search->count = PyTuple_GET_SIZE(needles);
	search->most = most;
	search->needles = PyMem_Calloc(search->count + 1, sizeof(*search->needles));
	search->found = PyMem_Calloc(most, 2 * sizeof(*search->found));
	if (search->needles == NULL || search->found == NULL) {
		PyErr_NoMemory();
		goto end;
	}
	for (Py_ssize_t number = 0; number < search->count; number++) {
		struct needle *needle = &search->needles[number];
		char *text;
		if (PyBytes_AsStringAndSize(PyTuple_GET_ITEM(needles, number), &text, &needle->length) < 0)
			goto end;
		if (needle->length == 0) {
			PyErr_SetString(PyExc_ValueError, "an empty needle is everywhere");
			goto end;
		}
		needle->octets = text;
	}
	Py_BEGIN_ALLOW_THREADS
	prepare(search);
	scan(search, octets.buf, octets.len);
	Py_END_ALLOW_THREADS
	list = as_list(search);
end:
	if (search != NULL) {
		PyMem_Free(search->needles);
		PyMem_Free(search->found);
	}
	PyMem_Free(search);
	PyBuffer_Release(&octets);
	return list;
}

static PyMethodDef methods[] = {
	{"occurrences", occurrences, METH_VARARGS,
	 "occurrences(octets, needles, most): where which of a tuple of needles is, in ascending order: "
	 "a list of (place, number), with so many elements at most. Raises ValueError for an empty one."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "keyd.inspection.occurrences",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_occurrences(void);
PyMODINIT_FUNC PyInit_occurrences(void)
{
	return PyModule_Create(&definition);
}
