package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// maxFile is the largest configuration file, in bytes.
const maxFile = 1 << 20

// Load reads, completes and validates the file at path. Its error is an Errors.
func Load(path string) (*Config, error) {
	info, err := os.Stat(path)
	var data []byte
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = errors.New("not a regular file")
	case info.Size() > maxFile:
		err = fmt.Errorf("%d bytes, the limit is %d", info.Size(), maxFile)
	default:
		data, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, Errors{{File: path, Problem: "cannot read the configuration: " + reason(err), Remedy: "name a readable file with -c"}}
	}
	return Parse(path, data)
}

// Parse completes and validates the TOML in data. The name stands in errors, and
// relative paths are relative to its directory. Its error is an Errors with every
// problem; the TOML grammar is the exception, whose first mistake ends the reading.
func Parse(name string, data []byte) (*Config, error) {
	var tree map[string]any
	if err := toml.Unmarshal(data, &tree); err != nil {
		return nil, Errors{grammarError(name, err)}
	}
	base, err := filepath.Abs(filepath.Dir(name))
	if err != nil {
		return nil, Errors{{File: name, Problem: "its directory is unknown: " + reason(err), Remedy: "name the file by its absolute path"}}
	}
	c := New()
	c.src = &source{file: name, lines: keyLines(data)}
	r := &reader{problems: problems{src: c.src}, meant: make(map[string]bool)}
	r.config(c, tree)
	c.complete(base)
	// One mistake gets one message: what could not be read still has its default, and
	// that this is not enough is no news.
	v := &problems{src: c.src}
	c.validate(v)
	fresh := slices.DeleteFunc(v.errs, func(e *Error) bool { return r.reported(e.Key) })
	r.errs = append(r.errs, fresh...)
	if err := r.err(); err != nil {
		return nil, err
	}
	return c, nil
}

func grammarError(name string, err error) *Error {
	e := &Error{File: name, Problem: strings.TrimPrefix(err.Error(), "toml: "), Remedy: "correct the TOML here; nothing after it was read"}
	var de *toml.DecodeError
	if errors.As(err, &de) {
		e.Line, _ = de.Position()
		e.Key = strings.Join(de.Key(), ".")
	}
	return e
}

// reason is an error of the file system without what the message around it says.
func reason(err error) string {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return err.Error()
}
