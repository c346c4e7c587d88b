/*
 * The modules in C that each fork server has, in one library. Each library is several mappings, which
 * each fork copies and each worker's end takes down.
 *
 * Loaded with the packages of these modules, which are found under their own names. What only some
 * virtual hosts need (alpn.c, verification.c) is a library of its own: what nobody uses, no worker
 * has.
 */

#include <Python.h>

#include <string.h>

PyMODINIT_FUNC PyInit_flow(void);
PyMODINIT_FUNC PyInit_forking(void);
PyMODINIT_FUNC PyInit_heap(void);
PyMODINIT_FUNC PyInit_immortal(void);
PyMODINIT_FUNC PyInit_transcript(void);

static const struct {
	const char *name;
	PyObject *(*make)(void);
} modules[] = {
	{"titus_py.fork_server.forking", PyInit_forking},
	{"titus_py.fork_server.heap", PyInit_heap},
	{"titus_py.fork_server.immortal", PyInit_immortal},
	{"titus_py.worker.flow", PyInit_flow},
	{"titus_py.worker.transcript", PyInit_transcript},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.native",
	.m_size = 0,
};

PyMODINIT_FUNC PyInit_native(void);
PyMODINIT_FUNC PyInit_native(void)
{
	PyObject *loaded = PyImport_GetModuleDict();
	PyObject *all = PyModule_Create(&definition);
	for (size_t at = 0; all != NULL && at < sizeof(modules) / sizeof(modules[0]); at++) {
		PyObject *module = modules[at].make();
		if (module == NULL || PyDict_SetItemString(loaded, modules[at].name, module) < 0 ||
		    PyModule_AddObjectRef(all, strrchr(modules[at].name, '.') + 1, module) < 0)
			Py_CLEAR(all);
		Py_XDECREF(module);
	}
	return all;
}
