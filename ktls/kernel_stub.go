package ktls

// Stand-ins for kernel.go and probe.go; this file goes when they are there.

import "fmt"

const notBuilt = "the kernel layer is not built yet"

func supportsKernel(version, suite uint16) (ok bool, reason string) { return false, notBuilt }

func kernelPossible() (ok bool, reason string) { return false, notBuilt }

func attachKernel(sock Socket) error { return fmt.Errorf("%s: %w", notBuilt, ErrNoKernelTLS) }

func newKernelLayer(sock Socket, p params, tx, rx *direction) (recordLayer, error) {
	return nil, fmt.Errorf("%s: %w: %w", notBuilt, ErrNoKernelTLS, errKernelUntouched)
}

func importKernelLayer(sock Socket, p params, st *layerState) (recordLayer, error) {
	return nil, fmt.Errorf("%s: %w", notBuilt, ErrNoKernelTLS)
}
