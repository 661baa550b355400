// Package sys is the project's kernel edge: the only package that imports
// golang.org/x/sys. It wraps system calls thinly, one topic a file, and decides
// nothing.
package sys
